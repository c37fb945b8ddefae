"""Transfer entropy of sets of attention layers, and the greedy step on it.

    TE(S) = H(output) - H(output with the layers of S masked)          (nats)

Source: Lin et al., CVPR 2024, section 3.2, equation 5.
"""

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from .calibration_passes import CalibrationPasses
from .entropy import GaussianEntropy, merge_across_processes
from .masked_forward import MaskedForward
from .output_change import OutputChange, kind_of_output, sum_of_changes
from .processes import gather
from .stability import draw_folds, resampled_transfer_entropy, share_picked


if TYPE_CHECKING:
    from .config import SelectionConfig

COMPARISONS = ("magnitude", "value")


@dataclass
class SelectionStep:
    """
    One step of a greedy search.

    Attributes:
        selected: the set so far.
        transfer_entropy: of that set with each candidate, in nats.
        picked: the candidate of least transfer entropy.
        stability: share of resamples of the images, in [0, 1], in which the same candidate is picked.
        standard_error: of the picked candidate's transfer entropy over these resamples, in nats.
    """

    selected: list[int]
    transfer_entropy: dict[int, float]
    picked: int
    stability: float | None = None
    standard_error: float | None = None


class AttentionSearch:
    """
    What a strategy works with: the candidates, how many to pick, and transfer entropy on demand.

    Transfer entropies are kept, so no set is measured twice. Memory grows with batch size, depth and the number of
    sets, never with the number of images. With several processes each computes its share of the images.

    Args:
        passes ([`CalibrationPasses`]): the model, and the images in folds.
        num_layers (`int`): how many layers to pick.
        config ([`SelectionConfig`]): `output` (named), `mask`, `compare` and `seed` of the selection.

    Attributes:
        candidates (`list[int]`): layers that still have attention.
        seed (`int`): for strategies that draw.
        steps (`list[SelectionStep]`): what `pick` recorded.
        attention_entropy, mlp_entropy (`list`): of each layer, in nats.
        unmasked ([`GaussianEntropy`]): of the unmasked model's output, after the first measurement.
    """

    def __init__(self, passes: CalibrationPasses, num_layers: int, config: "SelectionConfig"):
        self.passes, self.num_layers = passes, num_layers
        self.compare, self.seed = config.compare, config.seed
        self.candidates = passes.model.config.kept_layers
        self.steps: list[SelectionStep] = []
        self.attention_entropy, self.mlp_entropy = passes.layer_entropies()
        self.unmasked: GaussianEntropy | None = None
        self.forward = MaskedForward(passes.model, config.output, config.mask)
        self._values: dict[frozenset[int], float] = {}  # H(output) by masked set
        self._changes: dict[frozenset[int], OutputChange] = {}

    @property
    def block_evaluations(self) -> float:
        """Blocks computed so far by all processes, per calibration image."""
        return sum(gather(self.forward.blocks)) / self.passes.batches.num_images

    @property
    def naive_block_evaluations(self) -> float:
        """The same if every set compared, and the unmasked model, were computed from the image on."""
        compared = sum(len(step.transfer_entropy) for step in self.steps) or len(self._values)
        return len(self.passes.model.encoder_layers) * (1 + compared)

    def size(self, transfer_entropy: float) -> float:
        """What is compared: the magnitude of a transfer entropy, or its value."""
        return abs(transfer_entropy) if self.compare == "magnitude" else transfer_entropy

    def transfer_entropy(self, sets: Sequence[Iterable[int]]) -> list[float]:
        """TE of each set of masked layers, in nats, over all calibration images, in one pass."""
        sets = [frozenset(layers) for layers in sets]
        missing = [one for one in dict.fromkeys(sets) if one not in self._values]
        if missing:
            self._measure(missing, num_folds=1)
        return [self._values[frozenset()] - self._values[one] for one in sets]

    def pick(self, selected: Sequence[int]) -> int:
        """The candidate that has the least transfer entropy together with `selected`; the step is recorded."""
        sets = {layer: frozenset([*selected, layer]) for layer in self.candidates if layer not in selected}
        moments = self._measure(list(sets.values()), num_folds=self.passes.batches.num_folds)
        values = dict(zip(sets, self.transfer_entropy(list(sets.values())), strict=True))
        picked = min(values, key=lambda layer: self.size(values[layer]))
        step = SelectionStep(sorted(selected), values, picked)
        weights = draw_folds(self.unmasked.counts)
        if weights is not None:
            resampled = resampled_transfer_entropy(self.unmasked, moments, weights)
            position = list(sets).index(picked)
            step.stability = share_picked(resampled, position, self.compare == "magnitude")
            step.standard_error = resampled[:, position].std().item()
        self.steps.append(step)
        return picked

    def output_change(self, sets: Sequence[Iterable[int]]) -> list[OutputChange]:
        """How each set of masked layers changes the output, over all calibration images; their TE in the same pass."""
        sets = [frozenset(layers) for layers in sets]
        missing = [one for one in dict.fromkeys(sets) if one not in self._changes]
        if missing:
            self._measure_changes(list(dict.fromkeys([frozenset(), *missing])))
        return [self._changes[one] for one in sets]

    def measure_pairs(self) -> list[list[float | None]]:
        """TE of each pair of candidates, in nats, `[layer][layer]`; of single layers on the diagonal."""
        pairs = list(itertools.combinations_with_replacement(self.candidates, 2))
        depth = len(self.passes.model.encoder_layers)
        matrix: list[list[float | None]] = [[None] * depth for _ in range(depth)]
        for (one, other), value in zip(pairs, self.transfer_entropy(pairs), strict=True):
            matrix[one][other] = matrix[other][one] = value
        return matrix

    def _measure_changes(self, distinct: list[frozenset[int]]) -> None:
        """Of these sets, one of which is empty: the whole model."""
        kind = kind_of_output(self.passes.model, self.forward.output)
        sums = {one: torch.zeros(2, dtype=torch.float64) for one in distinct}

        def compare(outputs: dict[frozenset[int], torch.Tensor]) -> None:
            whole = outputs[frozenset()]
            for one in distinct:
                sums[one] += sum_of_changes(whole, outputs[one], kind)

        self._measure(distinct, num_folds=1, compare=compare)
        means = gather(sum(gather(torch.stack(list(sums.values())))) / self.passes.batches.num_images)[0].tolist()
        self._changes |= {one: OutputChange.of_means(*mean, kind) for one, mean in zip(distinct, means, strict=True)}

    def _measure(
        self, sets: list[frozenset[int]], num_folds: int, compare: Callable[[dict], None] | None = None
    ) -> list[GaussianEntropy]:
        """
        One pass that measures the output with each of `sets` masked, each given once, and the first time unmasked: all
        share their blocks. `compare` gets the outputs of a batch, by set.
        """
        estimates = {one: GaussianEntropy(num_folds) for one in sets}
        if self.unmasked is None:
            self.unmasked = GaussianEntropy(self.passes.batches.num_folds)
            estimates = {frozenset(): self.unmasked} | {one: estimates[one] for one in sets if one}
        measured = list(estimates)

        def measure(pixel_values: torch.Tensor, folds: torch.Tensor) -> None:
            outputs = {}
            for (position,), features in self.forward(pixel_values, measured):
                estimates[measured[position]].update(features, folds)
                if compare is not None:
                    outputs[measured[position]] = features
            if compare is not None:
                compare(outputs)

        self.passes.for_each_batch(measure, f"transfer entropy of {len(measured)} sets")
        merge_across_processes(list(estimates.values()))
        # Rounding may differ between processes' hardware, but what they pick must not: the values of the first count.
        values = gather([estimate.value() for estimate in estimates.values()])[0]
        self._values = dict(zip(measured, values, strict=True)) | self._values
        return [estimates[one] for one in sets]
