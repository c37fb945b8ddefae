"""How many attention layers can go? What each number of them changes and saves, without training or labels."""

import copy
import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ..models.pretrained_model import LambdaPreTrainedModel
from ..selection.config import SelectionConfig
from ..selection.processes import rank_and_num_processes
from ..selection.select import AttentionSelection, select_attention_layers
from ..selection.strategies import STRATEGIES
from .accounting import count_macs, count_parameters
from .throughput import describe_environment, images_per_second


COMPARED = ("cosine", "attention_deviation", "weight_entropy", "first", "last", "random")


@dataclass(frozen=True)
class CurvePoint:
    """
    The model without some of its attention, before any training.

    Attributes:
        layers: without attention, 0-based, in the order picked.
        transfer_entropy: of these layers, in nats.
        divergence, agreement, kind: how far the output is from the whole model's, see [`OutputChange`].
        parameters, macs: of the model, and multiply-accumulates for an image, in a model with linear maps with as many
            more; `None` of strategies compared with.
        images_per_second: measured in turns; `None` where it was not.
    """

    layers: list[int]
    transfer_entropy: float
    divergence: float
    agreement: float | None
    parameters: int | None = None
    macs: int | None = None
    images_per_second: float | None = None
    kind: str = field(kw_only=True)


@dataclass
class RemovalCurve:
    """
    What removal changes and saves, layer by layer.

    Attributes:
        points: entry `k` is the model without the first `k` layers picked; 0 is the whole model.
        selection: the search, of all layers but one.
        compared: of other strategies, by name, the same points.
        environment: hardware, versions and date of the speeds.
    """

    points: list[CurvePoint]
    selection: AttentionSelection
    compared: dict[str, list[CurvePoint]] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)

    def choose(self, max_divergence: float | None = None, min_agreement: float | None = None) -> int:
        """
        The largest number of layers up to which every number keeps within both bounds; 0 if none does.

        Raises:
            ValueError: if no bound is given, or one is out of range, or agreement is asked for where there is none.
        """
        if max_divergence is None and min_agreement is None:
            raise ValueError("Give `max_divergence`, `min_agreement`, or both.")
        if max_divergence is not None and not max_divergence >= 0:
            raise ValueError(f"`max_divergence` must be 0 or more, got {max_divergence}.")
        if min_agreement is not None and not 0 <= min_agreement <= 1:
            raise ValueError(f"`min_agreement` must lie in [0, 1], got {min_agreement}.")
        if min_agreement is not None and self.points[0].agreement is None:
            raise ValueError("Without a head of classes there is no agreement: use `max_divergence`.")
        for number, point in enumerate(self.points[1:]):
            too_far = max_divergence is not None and point.divergence > max_divergence
            if too_far or (min_agreement is not None and point.agreement < min_agreement):
                return number
        return len(self.points) - 1

    def selection_of(self, num_removed_layers: int) -> AttentionSelection:
        """The choice of the first layers picked, as a search for so many would have made it."""
        order = self.selection.order[:num_removed_layers]
        value = self.points[num_removed_layers].transfer_entropy
        steps = self.selection.steps[:num_removed_layers]
        changes = self.selection.changes[:num_removed_layers]
        return dataclasses.replace(self.selection, order=order, transfer_entropy=value, steps=steps, changes=changes)

    def to_dict(self) -> dict:
        """JSON-serialisable."""
        return {
            "points": [dataclasses.asdict(point) for point in self.points],
            "compared": {name: [dataclasses.asdict(p) for p in points] for name, points in self.compared.items()},
            "environment": self.environment,
            "selection": self.selection.to_dict(),
        }

    def save(self, path: str | Path) -> None:
        """Write JSON."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")


def removal_curve(
    model: LambdaPreTrainedModel,
    calibration,
    selection: SelectionConfig | None = None,
    *,
    image_processor=None,
    compare_with: Sequence[str] = COMPARED,
    pixel_values: torch.Tensor | None = None,
    rounds: int = 5,
    disable_tqdm: bool = False,
) -> RemovalCurve:
    """
    Remove one attention layer after another, by a strategy, and measure what is left. The model is left as it was. In
    a distributed run every process must call it with the same images.

    Args:
        model ([`LambdaPreTrainedModel`]): the trained model.
        calibration: images, as [`select_attention_layers`] takes them.
        selection ([`SelectionConfig`], *optional*): its options. The strategy must be nested, as all are but
            `"exhaustive"`.
        image_processor (*optional*): of Hugging Face, where `calibration` holds pictures.
        compare_with (`Sequence[str]`, *optional*): strategies to compare with, at each number of layers.
        pixel_values (`torch.Tensor` of shape `(batch, channels, height, width)`, *optional*): a batch to measure speed
            on, on the main process; without it no speed is measured.
        rounds (`int`, *optional*, defaults to 5): turns of each model. Speeds are medians.
        disable_tqdm (`bool`, *optional*, defaults to `False`): no progress bar.

    Raises:
        ValueError: on a strategy that is not nested, and as [`select_attention_layers`].
    """
    config = SelectionConfig(calibration_size=None) if selection is None else selection
    if config.strategy == "exhaustive":
        raise ValueError("`strategy='exhaustive'` finds sets that do not hold each other: use 'nose' or 'beam'.")
    measured: dict[str, list[CurvePoint]] = {}
    blocks: list[float] = []

    def pick_and_measure(search) -> list[int]:
        order = (STRATEGIES[config.strategy] if isinstance(config.strategy, str) else config.strategy)(search)
        blocks.append(search.block_evaluations)
        orders = {"": order} | {name: STRATEGIES[name](search) for name in compare_with if name != config.strategy}
        sets = [picked[:number] for picked in orders.values() for number in range(len(order) + 1)]
        changes, entropies = search.output_change(sets), search.transfer_entropy(sets)
        points = [
            CurvePoint(list(layers), entropy, change.divergence, change.agreement, kind=change.kind)
            for layers, entropy, change in zip(sets, entropies, changes, strict=True)
        ]
        measured.update({name: [points.pop(0) for _ in range(len(order) + 1)] for name in orders})
        return order

    found = select_attention_layers(
        model, calibration, len(model.config.kept_layers) - 1, strategy=pick_and_measure, selection=config,
        image_processor=image_processor, disable_tqdm=disable_tqdm,
    )  # fmt: skip
    found.config = dataclasses.replace(found.config, strategy=config.strategy)
    found.block_evaluations = blocks[0]
    points = [_with_size(model, point) for point in measured.pop("")]
    if pixel_values is not None and rank_and_num_processes()[0] == 0:
        speeds = _measure_speeds(model, [point.layers for point in points], pixel_values, rounds)
        points = [
            dataclasses.replace(point, images_per_second=speed) for point, speed in zip(points, speeds, strict=True)
        ]
    return RemovalCurve(points, found, measured, describe_environment(model.device))


def _with_size(model: LambdaPreTrainedModel, point: CurvePoint) -> CurvePoint:
    config = copy.deepcopy(model.config)
    config.attention_flags = [flag and i not in point.layers for i, flag in enumerate(config.attention_flags)]
    gone = [p for layer in point.layers for p in model.encoder_layers[layer].attention_parameters()]
    # Where linear maps are, more layers can only be replaced by more of them: `count_macs` counts them, too.
    width = config.hidden_size
    of_maps = len(point.layers) * (2 * width**2 + width) if config.fade_to == "linear" else 0
    return dataclasses.replace(
        point,
        parameters=count_parameters(model) - sum(parameter.numel() for parameter in gone) + of_maps,
        macs=count_macs(config, config.num_labels if model.has_class_head else 0),
    )


class _WithoutAttention(torch.nn.Module):
    """A model that computes none of the attention of some layers while it is called."""

    def __init__(self, model: LambdaPreTrainedModel, layers: list[int]):
        super().__init__()
        self.model, self.layers = model, layers

    def forward(self, pixel_values: torch.Tensor):
        self.model.set_attention_lambda(0.0, self.layers)
        try:
            return self.model(pixel_values)
        finally:
            self.model.set_attention_lambda(1.0, self.layers)


def _measure_speeds(model, sets: list[list[int]], pixel_values: torch.Tensor, rounds: int) -> list[float]:
    models = {str(number): _WithoutAttention(model, layers) for number, layers in enumerate(sets)}
    was_training = model.training
    model.eval()
    pixel_values = pixel_values.to(model.device, model.dtype)
    try:
        return list(images_per_second(models, pixel_values, rounds).values())
    finally:
        model.train(was_training)
