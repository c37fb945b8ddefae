"""A recipe as an experiment: its images, its base models, and the same training of every choice of layers."""

import copy
import dataclasses
from pathlib import Path

import torch
from torch.utils.data import Dataset, Subset
from transformers import set_seed

from benchmarks.base_model import BaseModel
from benchmarks.whole_blocks import without_blocks
from lambda_vit_hf import fit_linear_maps
from lambda_vit_hf.data.dataset import collate
from lambda_vit_hf.data.sampling import evenly_spaced
from lambda_vit_hf.evaluation.metrics import classification_metrics
from lambda_vit_hf.models.families import AutoLambdaModelForImageClassification
from lambda_vit_hf.training.arguments import PROGRAM_ARGUMENTS, parse_arguments
from lambda_vit_hf.training.callback import EntropyGuidedRemovalCallback
from lambda_vit_hf.training.guards import StopOnNonFiniteGradient
from lambda_vit_hf.training.output_folder import OutputFolder
from lambda_vit_hf.training.starting_model import load_starting_model
from lambda_vit_hf.training.tasks import TASKS
from lambda_vit_hf.training.trainer import ImageClassificationTrainer
from lambda_vit_hf.training.training_images import TrainingImages, load_splits


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
        }
        given = [name for name, value in unsupported.items() if value]
        if given:
            raise ValueError(f"The comparison trains without {given}: turn them off.")
        if self.training_args.device.type == "cpu":
            self.training_args.dataloader_pin_memory = False
        self.task = TASKS["image_classification"]
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
        pixel_values, labels = self._calibration(images)
        validation = Subset(images.evaluation, evenly_spaced(len(images.evaluation), self.num_masked_images))
        model = model.to(self.training_args.device)
        return BaseModel(model, pixel_values, validation, seed, self._autocast_dtype, labels)

    def dilute(
        self,
        layers: list[int],
        fade_to: str | None,
        seed: int,
        checkpoint: str | None = None,
        num_epochs: float | None = None,
        blocks: tuple[int, ...] = (),
    ) -> float:
        """
        Top-1 of the removed model after the recipe's training, from the base model of a seed. With no layers: of the
        whole model after the same training, which tells what the training alone does. `blocks` are left out, whole,
        from the first step on; with `fade_to="linear"`, linear maps are there from the first step on.
        """
        set_seed(seed)
        model, processor, _ = self._start(seed, checkpoint)
        teacher = model
        if blocks:
            model = without_blocks(model, list(blocks))
            set_seed(seed)
        callbacks = []
        if fade_to == "linear":
            pixel_values, _ = self._calibration(self._images(processor, seed))
            model.to(self.training_args.device)
            maps = fit_linear_maps(model, pixel_values, layers, autocast_dtype=self._autocast_dtype, disable_tqdm=True)
            teacher = copy.deepcopy(model)
            model.replace_attention(maps)
            set_seed(seed)
        elif layers:
            dilution = dataclasses.replace(self.removal_args.dilution_config(), fade_to=fade_to)
            callbacks = [EntropyGuidedRemovalCallback(removed_layers=layers, dilution=dilution)]
        epochs, learning_rate = num_epochs or self.training_args.num_train_epochs, self.training_args.learning_rate
        top1 = self._train(model, processor, seed, callbacks, epochs, learning_rate, teacher)
        if model.config.removed_layers != sorted(layers):
            raise RuntimeError(f"Layers {layers} were to be removed, but {model.config.removed_layers} were.")
        return top1

    def untrained_model(self) -> tuple:
        """The recipe's model as it is, with a new class head, and its image processor."""
        model, processor, _ = self._start(0, None)
        return model, processor

    def images(self, checkpoint: str | None, kind: str) -> Dataset:
        """`"clean"` or `"augmented"` (as DeiT's) training images, or those of `"validation"`, for a model's size."""
        _, processor, _ = self._start(0, checkpoint)
        options = dataclasses.replace(
            self.augmentation_args, random_shift=0, random_resized_crop=kind == "augmented",
            auto_augment="rand-m9-mstd0.5-inc1" if kind == "augmented" else None,
        )  # fmt: skip
        images = TrainingImages(self.splits, processor, self.data_args, options, self.training_args)
        return images.evaluation if kind == "validation" else images.train

    def _start(self, seed: int, checkpoint: str | None) -> tuple:
        model_args = copy.copy(self.model_args)
        model_args.model_name_or_path = checkpoint or model_args.model_name_or_path
        folder = OutputFolder(self.output_dir / f"seed-{seed}")
        class_names = self.splits["train"].features["label"].names
        return load_starting_model(model_args, class_names, folder, False, self.data_args.evaluation_crop)

    @property
    def _autocast_dtype(self) -> str | None:
        return "bfloat16" if self.training_args.bf16 else None

    def _calibration(self, images: TrainingImages) -> tuple[torch.Tensor, torch.Tensor]:
        """Images `(images, channels, height, width)` to choose layers on, and their labels."""
        size = self.removal_args.calibration_size
        calibration = images.calibration(size)
        items = list(Subset(calibration, evenly_spaced(len(calibration), size)))
        return torch.stack([item["pixel_values"] for item in items]), torch.tensor([item["labels"] for item in items])

    def _images(self, processor, seed: int) -> TrainingImages:
        args = copy.copy(self.training_args)
        args.seed = seed
        return TrainingImages(self.splits, processor, self.data_args, self.augmentation_args, args)

    def _train(
        self, model, processor, seed: int, callbacks: list, epochs: float, learning_rate: float, teacher=None
    ) -> float:
        args = copy.copy(self.training_args)
        args.num_train_epochs, args.learning_rate, args.seed = epochs, learning_rate, seed
        images = self._images(processor, seed)
        trainer = ImageClassificationTrainer(
            model=model, args=args, callbacks=[*callbacks, StopOnNonFiniteGradient()],
            train_dataset=images.train, eval_dataset=images.evaluation, data_collator=collate,
            train_collator=images.collator, compute_metrics=classification_metrics,
        )  # fmt: skip
        if teacher is not None:
            self.task.teach(trainer, teacher, args)
        trainer.train()
        return trainer.evaluate()["eval_accuracy"]
