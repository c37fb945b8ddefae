"""A trained model, and everything about a choice of its attention layers that needs no training."""

import functools
import itertools
import math
import random
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from scipy.stats import spearmanr
from torch.utils.data import DataLoader, Dataset

from benchmarks.linear_maps import change_by_linear_maps, choose_for_linear_maps, with_linear_maps
from benchmarks.more_strategies import MORE_STRATEGIES
from benchmarks.whole_blocks import choose_blocks, count_equal_blocks, without_blocks
from lambda_vit_hf.data.dataset import collate
from lambda_vit_hf.selection.masked_forward import MASKS, OUTPUTS, MaskedForward
from lambda_vit_hf.selection.search import COMPARISONS
from lambda_vit_hf.selection.select import AttentionSelection, select_attention_layers


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
        labels (`torch.Tensor` of shape `(images,)`, *optional*): of the calibration images, for rules that need them.

    Raises:
        ValueError: if the class head is newly initialized.
    """

    def __init__(
        self,
        model,
        calibration: torch.Tensor,
        validation: Dataset,
        seed: int,
        autocast_dtype: str | None = None,
        labels: torch.Tensor | None = None,
    ):
        if getattr(model, "newly_initialized_head", False):
            raise ValueError(
                "The class head is newly initialized: neither its entropy nor its accuracy says anything."
            )
        self.model, self.calibration, self.validation, self.seed = model.eval(), calibration, validation, seed
        self.autocast_dtype, self.labels = autocast_dtype, labels
        (self.top1,) = self.measure_top1([[]], "skip")

    def select(self, strategy, num_layers: int, **choices) -> AttentionSelection:
        """[`select_attention_layers`] on the calibration images."""
        return select_attention_layers(
            self.model, self.calibration, num_layers, strategy=strategy, disable_tqdm=True,
            autocast_dtype=self.autocast_dtype, **({"seed": self.seed} | choices),
        )  # fmt: skip

    def add_top1(self, runs: list[dict]) -> list[dict]:
        """To each run, top-1 right after its layers are taken out, under both masks: each set once, in one pass."""
        sets = {tuple(run["layers"]): None for run in runs}
        for mask in MASKS:
            top1 = dict(zip(sets, self.measure_top1(list(sets), mask), strict=True))
            for run in runs:
                run[f"top1_{mask}"] = top1[tuple(run["layers"])]
        return runs

    def compare_strategies(
        self, strategies: Sequence[str], numbers: Sequence[int], fades: Sequence[str] = ("identity",)
    ) -> list[dict]:
        """
        Every strategy at every number of removed layers, for each `fade_to`: layers, what taking them out changes
        (transfer entropy and KL divergence in nats, top-1), nothing trained. `"nose:skip"` is `"nose"` with the mask
        `"skip"`, whatever attention fades to; `"random:3"` is another draw than `"random:2"`; `more_strategies` has
        more. Of `"linear"`, layers are chosen with the mask `"skip"`.
        """
        runs = []
        for fade_to, num_layers, name in itertools.product(fades, numbers, strategies):
            strategy, _, option = name.partition(":")
            if option and option not in MASKS and not option.isdigit():
                raise ValueError(f"{name!r}: a mask of {list(MASKS)} or the number of a draw comes after the colon.")
            if strategy in MORE_STRATEGIES:
                strategy = functools.partial(MORE_STRATEGIES[strategy], labels=self.labels)
            seed = {"seed": 1000 * self.seed + int(option)} if option.isdigit() else {}
            mask = option if option in MASKS else "skip" if fade_to == "linear" else fade_to
            selection = self.select(strategy, num_layers, mask=mask, **seed)
            runs.append({
                "seed": self.seed, "fade_to": fade_to, "strategy": name, "num_removed": num_layers,
                "layers": selection.layers, "order": selection.order,
                "transfer_entropy": selection.transfer_entropy, "top1_before": self.top1,
            })  # fmt: skip
            if fade_to == "linear":
                runs[-1]["top1_linear"] = self.measure_linear_map(selection.layers)
        return self.add_divergence(self.add_top1(runs))

    def compare_blocks(self, numbers: Sequence[int]) -> list[dict]:
        """Whole blocks, chosen by KL, at the multiply-accumulates of each number of attention layers; top-1 as is."""
        runs = []
        for number in numbers:
            blocks = choose_blocks(self.model, self.calibration, count_equal_blocks(self.model, number))
            with self._autocast():
                (top1,) = masked_top1(without_blocks(self.model, blocks).eval(), self.validation, [[]])
            runs.append({
                "seed": self.seed, "fade_to": "", "strategy": "whole blocks", "num_removed": number, "layers": [],
                "blocks": blocks, "top1_before": self.top1, "top1_skip": top1,
            })  # fmt: skip
        return runs

    def add_divergence(self, runs: list[dict]) -> list[dict]:
        """To each run, the KL divergence from the whole model (nats) when its layers are masked as they will fade."""
        with_maps = [run for run in runs if run["fade_to"] == "linear"]
        sets = [run["layers"] for run in with_maps]
        changes = change_by_linear_maps(self.model, self.calibration, sets, self.autocast_dtype)
        for run, change in zip(with_maps, changes, strict=True):
            run["divergence"] = change.divergence
        for fade_to in {run["fade_to"]: None for run in runs if run["fade_to"] != "linear"}:
            of_fade = [run for run in runs if run["fade_to"] == fade_to]
            found = []

            def measure(search, of_fade=of_fade, found=found):
                found.extend(search.output_change([run["layers"] for run in of_fade]))
                return []

            self.select(measure, 0, mask=fade_to)
            for run, change in zip(of_fade, found, strict=True):
                run["divergence"] = change.divergence
        return runs

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
        loss = {mask: [self.top1 - one for one in self.measure_top1(sets, mask)] for mask in MASKS}
        values = {
            f"{output}, {mask}": self._transfer_entropy(sets, output=output, mask=mask)
            for output in OUTPUTS
            for mask in MASKS
        }
        raw = {"sets": sets, "top1_loss": loss, "transfer_entropy": values}
        return {"seed": self.seed, "num_removed": num_layers, **raw, "correlations": correlations(**raw)}

    def choose_for_linear_maps(self, number: int) -> list[list[int]]:
        """Sets of 1, 2, ... `number` layers whose attention linear maps replace best, each in the order picked."""
        order = choose_for_linear_maps(self.model, self.calibration, number, self.autocast_dtype)
        return [order[:count] for count in range(1, number + 1)]

    def measure_linear_map(self, layers: list[int]) -> float:
        """Top-1 with linear maps in the place of the attention of these layers."""
        thinner = with_linear_maps(self.model, self.calibration, layers, self.autocast_dtype)
        with self._autocast():
            (top1,) = masked_top1(thinner, self.validation, [[]])
        return top1

    def measure_top1(self, sets: list, mask: str) -> list[float]:
        """Top-1 right after the attention of each set is taken out."""
        with self._autocast():
            return masked_top1(self.model, self.validation, sets, mask)

    def _autocast(self):
        dtype = self.autocast_dtype and getattr(torch, self.autocast_dtype)
        return torch.autocast(self.model.device.type, dtype, enabled=dtype is not None)

    def _transfer_entropy(self, sets: list[list[int]], **choices) -> list[float]:
        values = []

        def measure(search):
            values.extend(search.transfer_entropy(sets))
            return []

        self.select(measure, 0, **choices)
        return values


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
