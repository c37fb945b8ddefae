"""Ways of choosing layers, compared on equal terms: same base models, same images, same training.

An [`Experiment`] is a recipe: its images, its base models and its dilution. A [`BaseModel`] is one of them, measured
without any training.
"""

import copy
import dataclasses
import itertools
import math
import random
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from scipy.stats import spearmanr
from torch.utils.data import DataLoader, Dataset, Subset
from transformers import set_seed

from lambda_vit_hf.data.dataset import collate
from lambda_vit_hf.data.sampling import evenly_spaced
from lambda_vit_hf.evaluation.metrics import classification_metrics
from lambda_vit_hf.models.families import AutoLambdaModelForImageClassification
from lambda_vit_hf.selection.masked_forward import MASKS, OUTPUTS, MaskedForward
from lambda_vit_hf.selection.search import COMPARISONS
from lambda_vit_hf.selection.select import AttentionSelection, select_attention_layers
from lambda_vit_hf.training.arguments import PROGRAM_ARGUMENTS, parse_arguments
from lambda_vit_hf.training.callback import EntropyGuidedRemovalCallback
from lambda_vit_hf.training.guards import StopOnNonFiniteGradient
from lambda_vit_hf.training.output_folder import OutputFolder
from lambda_vit_hf.training.starting_model import load_starting_model
from lambda_vit_hf.training.trainer import ImageClassificationTrainer
from lambda_vit_hf.training.training_images import TrainingImages, load_splits


OPEN_CHOICES = [
    {"output": output, "mask": mask, "compare": compare}
    for output in OUTPUTS
    for mask in MASKS
    for compare in COMPARISONS
]


class BaseModel:
    """
    A trained model, and everything about a choice of layers that needs no training.

    Args:
        model ([`LambdaPreTrainedModel`]): a classifier with all its attention.
        calibration (`torch.Tensor` of shape `(images, channels, height, width)`): training images to select on.
        validation (`Dataset`): items with `pixel_values` and `labels`.
        seed (`int`): of the strategies and sets that are drawn.
        autocast_dtype (`str`, *optional*): to compute in.

    Raises:
        ValueError: if the class head is newly initialized.
    """

    def __init__(
        self, model, calibration: torch.Tensor, validation: Dataset, seed: int, autocast_dtype: str | None = None
    ):
        if getattr(model, "newly_initialized_head", False):
            raise ValueError(
                "The class head is newly initialized: neither its entropy nor its accuracy says anything."
            )
        self.model, self.calibration, self.validation, self.seed = model.eval(), calibration, validation, seed
        self.autocast_dtype = autocast_dtype
        (self.top1,) = self._top1([[]], "skip")

    def select(self, strategy, num_layers: int, **choices) -> AttentionSelection:
        """[`select_attention_layers`] on the calibration images."""
        return select_attention_layers(
            self.model, self.calibration, num_layers, strategy=strategy, seed=self.seed, disable_tqdm=True,
            autocast_dtype=self.autocast_dtype, **choices,
        )  # fmt: skip

    def add_top1(self, runs: list[dict]) -> list[dict]:
        """To each run, top-1 right after its layers are taken out, under both masks: each set once, in one pass."""
        sets = {tuple(run["layers"]): None for run in runs}
        for mask in MASKS:
            top1 = dict(zip(sets, self._top1(list(sets), mask), strict=True))
            for run in runs:
                run[f"top1_{mask}"] = top1[tuple(run["layers"])]
        return runs

    def compare_strategies(
        self, strategies: Sequence[str], numbers: Sequence[int], fades: Sequence[str] = ("identity",)
    ) -> list[dict]:
        """
        Every strategy at every number of removed layers, for each `fade_to`: layers, transfer entropy (nats), top-1
        right after. `"nose:skip"` is `"nose"` with the mask `"skip"`, whatever attention fades to.
        """
        runs = []
        for fade_to, num_layers, name in itertools.product(fades, numbers, strategies):
            strategy, _, mask = name.partition(":")
            selection = self.select(strategy, num_layers, mask=mask or fade_to)
            runs.append({
                "seed": self.seed, "fade_to": fade_to, "strategy": name, "num_removed": num_layers,
                "layers": selection.layers, "order": selection.order,
                "transfer_entropy": selection.transfer_entropy, "top1_before": self.top1,
            })  # fmt: skip
        return self.add_top1(runs)

    def compare_choices(self, numbers: Sequence[int]) -> list[dict]:
        """What NOSE picks with each of `OPEN_CHOICES`, and top-1 right after."""
        runs = []
        for choice in OPEN_CHOICES:
            # Greedy sets are nested: one search to the largest number holds all others.
            selection = self.select("nose", max(numbers), **choice)
            for num_layers in numbers:
                step, layers = selection.steps[num_layers - 1], sorted(selection.order[:num_layers])
                runs.append({
                    "seed": self.seed, "num_removed": num_layers, **choice, "layers": layers,
                    "order": selection.order[:num_layers], "transfer_entropy": step.transfer_entropy[step.picked],
                })  # fmt: skip
        return self.add_top1(runs)

    def measure_random_sets(self, num_layers: int, num_sets: int) -> dict:
        """Transfer entropy (nats) of random sets, their loss of top-1 right after removal, and their correlation."""
        sets = draw_sets(self.model.config.kept_layers, num_layers, num_sets, self.seed)
        loss = {mask: [self.top1 - one for one in self._top1(sets, mask)] for mask in MASKS}
        values = {
            f"{output}, {mask}": self._transfer_entropy(sets, output=output, mask=mask)
            for output in OUTPUTS
            for mask in MASKS
        }
        raw = {"sets": sets, "top1_loss": loss, "transfer_entropy": values}
        return {"seed": self.seed, "num_removed": num_layers, **raw, "correlations": correlations(**raw)}

    def _top1(self, sets: list, mask: str) -> list[float]:
        device, dtype = self.model.device.type, self.autocast_dtype and getattr(torch, self.autocast_dtype)
        with torch.autocast(device, dtype, enabled=dtype is not None):
            return masked_top1(self.model, self.validation, sets, mask)

    def _transfer_entropy(self, sets: list[list[int]], **choices) -> list[float]:
        values = []

        def measure(search):
            values.extend(search.transfer_entropy(sets))
            return []

        self.select(measure, 0, **choices)
        return values


class Experiment:
    """
    A recipe: images, base models, and the training of every choice of layers.

    Args:
        recipe (`str`): path of the YAML file.
        argv (`list[str]`): fields of the recipe to override, as on the command line of the training program.
        output_dir (`Path`): for base models; `seed-N/base` is taken up where it is there already.
        num_train_images (`int`, *optional*): train on this many, evenly spaced; all by default.
        num_masked_images (`int`, *optional*): measure what needs no training on this many validation images.
    """

    def __init__(
        self,
        recipe: str,
        argv: list[str],
        output_dir: Path,
        num_train_images: int | None = None,
        num_masked_images: int | None = None,
    ):
        fixed = ["--output_dir", str(output_dir / "trainer"), "--save_strategy", "no", "--eval_strategy", "no"]
        arguments = parse_arguments([recipe, *argv, *fixed, "--report_to", "none"], PROGRAM_ARGUMENTS)
        self.model_args, self.data_args, self.augmentation_args, self.removal_args, self.training_args = arguments
        unsupported = {
            "streaming": self.data_args.streaming,
            "repeated_augmentation": self.augmentation_args.repeated_augmentation > 1,
            "learning_rate_batch_size": self.training_args.learning_rate_batch_size,
            "ema_decay": self.training_args.ema_decay,
            "distillation": self.training_args.distillation != "none",
        }
        given = [name for name, value in unsupported.items() if value]
        if given:
            raise ValueError(f"The comparison trains without {given}: turn them off.")
        if self.training_args.device.type == "cpu":
            self.training_args.dataloader_pin_memory = False
        self.output_dir, self.num_masked_images = output_dir, num_masked_images
        self.splits = load_splits(self.data_args)
        indices = evenly_spaced(len(self.splits["train"]), num_train_images)
        self.splits["train"] = self.splits["train"].select(indices)

    def base_model(self, seed: int, checkpoint: str | None = None) -> BaseModel:
        """The model of a seed before removal: from a checkpoint, from an earlier run, or trained by the recipe."""
        set_seed(seed)
        model, processor, is_new = self._start(seed, checkpoint)
        if is_new or getattr(model, "newly_initialized_head", False):
            epochs, learning_rate = self.model_args.base_num_train_epochs, self.model_args.base_learning_rate
            self._train(model, processor, seed, [], epochs, learning_rate)
            folder = OutputFolder(self.output_dir / f"seed-{seed}").base
            model.save_pretrained(folder)
            processor.save_pretrained(folder)
            model = AutoLambdaModelForImageClassification.from_pretrained(folder)
        images = self._images(processor, seed)
        calibration = images.calibration(self.removal_args.calibration_size)
        indices = evenly_spaced(len(calibration), self.removal_args.calibration_size)
        pixel_values = torch.stack([item["pixel_values"] for item in Subset(calibration, indices)])
        validation = Subset(images.evaluation, evenly_spaced(len(images.evaluation), self.num_masked_images))
        autocast_dtype = "bfloat16" if self.training_args.bf16 else None
        return BaseModel(model.to(self.training_args.device), pixel_values, validation, seed, autocast_dtype)

    def dilute(
        self,
        layers: list[int],
        fade_to: str | None,
        seed: int,
        checkpoint: str | None = None,
        num_epochs: float | None = None,
    ) -> float:
        """
        Top-1 of the removed model after the recipe's training, from the base model of a seed. With no layers: of the
        whole model after the same training, which tells what the training alone does.
        """
        set_seed(seed)
        model, processor, _ = self._start(seed, checkpoint)
        dilution = dataclasses.replace(self.removal_args.dilution_config(), fade_to=fade_to)
        callbacks = [EntropyGuidedRemovalCallback(removed_layers=layers, dilution=dilution)] if layers else []
        epochs, learning_rate = num_epochs or self.training_args.num_train_epochs, self.training_args.learning_rate
        top1 = self._train(model, processor, seed, callbacks, epochs, learning_rate)
        if model.config.removed_layers != sorted(layers):
            raise RuntimeError(f"Layers {layers} were to be removed, but {model.config.removed_layers} were.")
        return top1

    def _start(self, seed: int, checkpoint: str | None) -> tuple:
        model_args = copy.copy(self.model_args)
        model_args.model_name_or_path = checkpoint or model_args.model_name_or_path
        folder = OutputFolder(self.output_dir / f"seed-{seed}")
        class_names = self.splits["train"].features["label"].names
        return load_starting_model(model_args, class_names, folder, False, self.data_args.evaluation_crop)

    def _images(self, processor, seed: int) -> TrainingImages:
        args = copy.copy(self.training_args)
        args.seed = seed
        return TrainingImages(self.splits, processor, self.data_args, self.augmentation_args, args)

    def _train(self, model, processor, seed: int, callbacks: list, epochs: float, learning_rate: float) -> float:
        args = copy.copy(self.training_args)
        args.num_train_epochs, args.learning_rate, args.seed = epochs, learning_rate, seed
        images = self._images(processor, seed)
        trainer = ImageClassificationTrainer(
            model=model, args=args, callbacks=[*callbacks, StopOnNonFiniteGradient()],
            train_dataset=images.train, eval_dataset=images.evaluation, data_collator=collate,
            train_collator=images.collator, compute_metrics=classification_metrics,
        )  # fmt: skip
        trainer.train()
        return trainer.evaluate()["eval_accuracy"]


@torch.no_grad()
def masked_top1(
    model, images: Dataset, sets: Sequence[Iterable[int]], mask: str = "skip", batch_size: int = 180
) -> list[float]:
    """
    Accuracy right after the attention of some layers is taken out, without any training, for many sets in one pass.

    Args:
        model ([`LambdaPreTrainedModel`]): the trained classifier, in eval mode.
        images (`Dataset`): items with `pixel_values` and `labels`; a negative label is left out.
        sets (`Sequence[Iterable[int]]`): sets of 0-based layers; `[]` is the model as it is.
        mask (`str`, *optional*, defaults to `"skip"`): as in [`select_attention_layers`].
        batch_size (`int`, *optional*, defaults to 180): images per batch.

    Returns:
        `list[float]`: top-1 of each set, in [0, 1].
    """
    forward, right, total = MaskedForward(model, "class_head", mask), [0] * len(sets), 0
    for batch in DataLoader(images, batch_size=batch_size, collate_fn=collate):
        labels = batch["labels"].to(model.device)
        for positions, scores in forward(batch["pixel_values"].to(model.device, model.dtype), sets):
            hits = int((scores.argmax(dim=-1) == labels).sum())
            for position in positions:
                right[position] += hits
        total += int((labels >= 0).sum())
    return [hits / total for hits in right]


def correlations(
    sets: list[list[int]], top1_loss: dict[str, list[float]], transfer_entropy: dict[str, list[float]]
) -> list[dict]:
    """
    Rank correlation of transfer entropy with the loss of top-1, for each of `OPEN_CHOICES`: over all sets, and over
    those without the layer whose sets lose most (a layer that ruins half of the sets is easy to predict).

    Args:
        sets (`list[list[int]]`): sets of layers.
        top1_loss (`dict[str, list[float]]`): by mask, of each set.
        transfer_entropy (`dict[str, list[float]]`): by `"output, mask"`, of each set, in nats.
    """
    rows = []
    for choice in OPEN_CHOICES:
        values = np.array(transfer_entropy[f"{choice['output']}, {choice['mask']}"])
        values = np.abs(values) if choice["compare"] == "magnitude" else values
        row = dict(choice)
        for mask, loss in top1_loss.items():
            mean_loss = {layer: np.mean([one for held, one in zip(sets, loss, strict=True) if layer in held])
                         for layer in {layer for held in sets for layer in held}}  # fmt: skip
            worst = max(sorted(mean_loss), key=mean_loss.get)
            rest = [position for position, held in enumerate(sets) if worst not in held]
            row[f"with_loss_{mask}"] = rank_correlation(values, loss)
            row[f"with_loss_{mask}_without_worst"] = rank_correlation(values[rest], np.array(loss)[rest])
            row[f"worst_{mask}"], row[f"sets_without_worst_{mask}"] = worst, len(rest)
        rows.append(row)
    return rows


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Spearman's, in [-1, 1]; `None` where the values of one are all equal."""
    return None if min(len(set(first)), len(set(second))) < 2 else float(spearmanr(first, second).statistic)


def draw_sets(candidates: Sequence[int], num_layers: int, num_sets: int, seed: int) -> list[list[int]]:
    """
    Distinct random sets of layers, sorted.

    Raises:
        ValueError: if there are not so many.
    """
    if math.comb(len(candidates), num_layers) < num_sets:
        raise ValueError(f"There are no {num_sets} different sets of {num_layers} of {len(candidates)} layers.")
    generator, sets = random.Random(f"{seed}-{num_layers}"), set()
    while len(sets) < num_sets:
        sets.add(tuple(sorted(generator.sample(candidates, num_layers))))
    return [list(one) for one in sorted(sets)]
