"""Transfer entropy of sets of attention layers, measured so that nothing is computed twice.

    TE(S) = H(output) - H(output with the layers of S masked)          (nats)

Source: Lin et al., CVPR 2024, section 3.2, equation 5.
"""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from .entropy import GaussianEntropy, merge_across_processes
from .masked_forward import MaskedForward
from .stability import draw_folds, may_be_least, resampled_transfer_entropy, share_picked
from .statistics import CalibrationPasses, same_on_every_process, sum_over_processes


COMPARISONS = ("magnitude", "value")
NUM_FOLDS = 32


@dataclass
class SelectionStep:
    """
    One step of a search.

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

    What was measured is kept as moments (mean and squared deviations per output channel) by set of layers and by fold
    of the images, so no set is computed twice on an image. Memory grows with batch size, depth and the number of sets
    kept, never with the number of images. With several processes each takes its share of the batches.

    Args:
        passes ([`CalibrationPasses`]): the model, and the images in folds.
        num_layers (`int`): how many layers to pick.
        output, mask, compare, seed: as in [`select_attention_layers`].
        reuse_prefixes (`bool`, *optional*, defaults to `True`):
            `False` computes every set from the image on, in one step of a search after the other: the naive search.

    Attributes:
        candidates (`list[int]`): layers that still have attention.
        steps (`list[SelectionStep]`): what `pick` recorded.
        block_evaluations (`float`): blocks computed so far, per calibration image.
        attention_entropy, mlp_entropy (`list`): of each layer, once `measure_layers` was called.
    """

    def __init__(
        self,
        passes: CalibrationPasses,
        num_layers: int,
        output: str,
        mask: str,
        compare: str,
        seed: int = 0,
        reuse_prefixes: bool = True,
    ):
        self.passes, self.num_layers = passes, num_layers
        self.compare, self.seed, self.reuse_prefixes = compare, seed, reuse_prefixes
        self.candidates = passes.model.config.kept_layers
        self.steps: list[SelectionStep] = []
        self.attention_entropy: list[float | None] = []
        self.mlp_entropy: list[float] = []
        self._forward = MaskedForward(passes.model, output, mask, reuse_prefixes)
        self._moments: dict[frozenset[int], GaussianEntropy] = {}
        self._measured_folds: dict[frozenset[int], set[int]] = {}
        self._values: dict[frozenset[int], float] = {}

    @property
    def num_images(self) -> int:
        """Calibration images."""
        if not self.passes.batches.num_images:
            self.measure([])  # a stream is counted by reading it
        return self.passes.batches.num_images

    @property
    def has_positions(self) -> bool:
        """Whether some of the images can be read without the others; not so for a stream."""
        return self.passes.batches.has_positions

    @property
    def block_evaluations(self) -> float:
        """Blocks computed so far by this and all other processes, per calibration image."""
        blocks = sum_over_processes(torch.tensor(self._forward.blocks)).item()
        return blocks / self.passes.batches.num_images if blocks else 0.0

    @property
    def naive_block_evaluations(self) -> float:
        """The same if every set compared, and the unmasked model, were computed from the image on."""
        compared = sum(len(step.transfer_entropy) for step in self.steps) or len(self._values)
        return len(self.passes.model.encoder_layers) * (1 + compared)

    @property
    def output_entropy(self) -> float:
        """H(output) of the unmasked model, in nats."""
        self.measure([])
        return self._moments[frozenset()].value()

    @property
    def dead_channels(self) -> int:
        """Output channels that never change."""
        self.measure([])
        return self._moments[frozenset()].dead_channels()

    @property
    def num_channels(self) -> int:
        """Width of the measured output."""
        self.measure([])
        return self._moments[frozenset()].means.shape[1]

    def size(self, transfer_entropy: float) -> float:
        """What is compared: the magnitude of a transfer entropy, or its value."""
        return abs(transfer_entropy) if self.compare == "magnitude" else transfer_entropy

    def transfer_entropy(self, sets: Sequence[Iterable[int]]) -> list[float]:
        """TE of each set of masked layers, in nats, over all calibration images, in one pass."""
        sets = [frozenset(layers) for layers in sets]
        if frozenset() not in self._moments:
            self.measure(sets[:1])
        new = list(dict.fromkeys(one for one in sets if one not in self._values))
        kept, missing = (one for one in new if not self.unknown([one])), self.unknown(new)
        self._values |= {one: self._moments[one].value() for one in kept}
        if missing:
            # One estimate per set, over all images: of the thousands that a search may try, no folds are kept.
            estimates = [GaussianEntropy() for _ in missing]
            self._pass(missing, self._all_folds, estimates)
            self._values |= {one: estimate.value() for one, estimate in zip(missing, estimates, strict=True)}
        unmasked = self.output_entropy
        return [unmasked - self._values[one] for one in sets]

    def measure(self, sets: Iterable[Iterable[int]], folds: Sequence[int] | None = None) -> None:
        """Measure what is unknown of `sets` and of the unmasked model, on these folds or all; moments are kept."""
        folds = self._all_folds if folds is None else folds
        sets = list(dict.fromkeys([frozenset(), *map(frozenset, sets)]))
        together: dict[tuple, list[int]] = {}
        for fold in folds:
            missing = tuple(one for one in sets if fold not in self._measured_folds.get(one, ()))
            together.setdefault(missing, []).append(fold)
        for missing, same_folds in together.items():
            if missing:
                estimates = [GaussianEntropy(self.passes.batches.num_folds) for _ in missing]
                self._pass(missing, same_folds, estimates)
                for one, estimate in zip(missing, estimates, strict=True):
                    self._moments.setdefault(one, GaussianEntropy(self.passes.batches.num_folds)).merge(estimate)
                    self._measured_folds.setdefault(one, set()).update(same_folds)

    def sets_with(self, order: Sequence[int]) -> dict[int, frozenset[int]]:
        """The layers in `order` with each other candidate: what one step of a search compares."""
        return {layer: frozenset([*order, layer]) for layer in self.candidates if layer not in order}

    def unknown(self, sets: Iterable[frozenset[int]]) -> list[frozenset[int]]:
        """Those of `sets` that are not measured yet on all images."""
        everything = set(self._all_folds)
        return [one for one in dict.fromkeys(sets) if not everything <= self._measured_folds.get(one, set())]

    def step(self, order: Sequence[int], layers: Iterable[int] | None = None) -> dict[int, float]:
        """TE, in nats, of the layers in `order` with each of `layers` (by default each other candidate)."""
        sets = self.sets_with(order)
        sets = sets if layers is None else {layer: sets[layer] for layer in layers}
        self.measure(sets.values())
        unmasked = self.output_entropy
        return {layer: unmasked - self._moments[one].value() for layer, one in sets.items()}

    def least(self, transfer_entropy: dict[int, float]) -> int:
        """The candidate with the least transfer entropy; ties: the lowest layer."""
        return same_on_every_process(
            min(sorted(transfer_entropy), key=lambda layer: self.size(transfer_entropy[layer]))
        )

    def pick(self, selected: Sequence[int], transfer_entropy: dict[int, float]) -> int:
        """The candidate with the least transfer entropy; the step is recorded, with its stability where known."""
        step = SelectionStep(sorted(selected), transfer_entropy, self.least(transfer_entropy))
        sets = self.sets_with(selected)
        resampled = None if self.unknown(sets.values()) else self._resampled(list(sets.values()), self._all_folds)
        if resampled is not None:
            position = list(sets).index(step.picked)
            step.stability = share_picked(resampled, position, self.compare == "magnitude")
            step.standard_error = resampled[:, position].std().item()
        self.steps.append(step)
        return step.picked

    def in_the_running(self, order: Sequence[int], layers: Sequence[int], folds: Sequence[int]) -> list[int]:
        """Those of `layers` that all images may yet pick after `order`, judged by some folds of them."""
        sets = [self.sets_with(order)[layer] for layer in layers]
        self.measure(sets, folds)
        resampled = self._resampled(sets, folds)
        if resampled is None:
            return list(layers)
        whole = torch.zeros(1, len(self._all_folds), dtype=torch.float64)
        whole[0, list(folds)] = 1
        unmasked = self._moments[frozenset()]
        (measured,) = resampled_transfer_entropy(unmasked, [self._moments[one] for one in sets], whole)
        share = len(folds) / len(self._all_folds)
        keep = may_be_least(measured, resampled, self.compare == "magnitude", len(folds), share)
        return same_on_every_process([layer for layer, may_be in zip(layers, keep.tolist(), strict=True) if may_be])

    def measure_pairs(self) -> list[list[float | None]]:
        """TE of each pair of candidates, in nats, `[layer][layer]`; of single layers on the diagonal."""
        pairs = list(itertools.combinations_with_replacement(self.candidates, 2))
        matrix: list[list[float | None]] = [
            [None] * len(self.passes.model.encoder_layers) for _ in self.passes.model.encoder_layers
        ]
        for (one, other), value in zip(pairs, self.transfer_entropy(pairs), strict=True):
            matrix[one][other] = matrix[other][one] = value
        return matrix

    def measure_layers(self) -> None:
        """Sets `attention_entropy` and `mlp_entropy` (see [`CalibrationPasses.layer_entropies`])."""
        self.attention_entropy, self.mlp_entropy = self.passes.layer_entropies()

    @property
    def _all_folds(self) -> range:
        return range(self.passes.batches.num_folds)

    def _resampled(self, sets: Sequence[frozenset[int]], folds: Sequence[int]) -> torch.Tensor | None:
        # TE of each set over resamples of some folds, (resamples, sets); None if too few folds have images.
        unmasked = self._moments[frozenset()]
        weights = draw_folds(unmasked.counts, folds)
        if weights is None:
            return None
        return resampled_transfer_entropy(unmasked, [self._moments[one] for one in sets], weights)

    def _pass(self, sets: Sequence[frozenset[int]], folds: Sequence[int], estimates: list[GaussianEntropy]) -> None:
        def measure(pixel_values: torch.Tensor, of_images: torch.Tensor) -> None:
            for positions, features in self._forward(pixel_values, sets):
                for position in positions:
                    estimate = estimates[position]
                    estimate.update(features, of_images if estimate.num_folds > 1 else None)

        self.passes.for_each_batch(measure, f"transfer entropy of {len(sets)} sets", folds)
        merge_across_processes(estimates)
