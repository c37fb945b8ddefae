"""How many attention layers a training removes, or which; and whether that will work, known before it begins."""

import copy
import operator
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from ..models.folding import check_layer_indices
from ..models.modeling_lambda_vit import LambdaViTPreTrainedModel
from ..selection.select import count_layers


@dataclass(frozen=True)
class RemovalAmount:
    """
    One of three ways to say how much attention goes. Holds plain values, whatever they were given as.

    Args:
        removal_ratio (`float`, *optional*): fraction of the attention layers, in [0, 1]; or
        num_removed_layers (`int`, *optional*): how many; or
        removed_layers (`Iterable[int]`, *optional*): which, 0-based; sorted.

    Raises:
        ValueError: if not exactly one is given, or if it can fit no model.
    """

    removal_ratio: float | None = None
    num_removed_layers: int | None = None
    removed_layers: list[int] | None = None

    def __post_init__(self):
        kinds = {"removal_ratio": _fraction, "num_removed_layers": _count, "removed_layers": _layers}
        given = {name: kind for name, kind in kinds.items() if getattr(self, name) is not None}
        if len(given) != 1:
            raise ValueError(f"Give exactly one of {', '.join(f'`{name}`' for name in kinds)}.")
        for name, kind in given.items():
            object.__setattr__(self, name, kind(getattr(self, name)))

    def count(self, model: LambdaViTPreTrainedModel) -> int:
        """
        How many layers will be removed of this model.

        Raises:
            ValueError: if they do not fit the model.
        """
        kept, num_layers = model.config.kept_layers, model.config.num_hidden_layers
        if self.removed_layers is not None:
            gone = sorted(set(check_layer_indices(self.removed_layers, num_layers)) - set(kept))
            if gone:
                raise ValueError(
                    f"The attention of layers {gone} is removed already. To train such a model on, leave them out."
                )
            return count_layers(len(kept), len(self.removed_layers), None)
        count = count_layers(len(kept), self.num_removed_layers, self.removal_ratio)
        if self.removal_ratio and not count:
            raise ValueError(
                f"`removal_ratio` {self.removal_ratio} of {len(kept)} attention layers is less than half a layer:"
                f" nothing would be removed. {0.5 / len(kept):.3f} or more removes one."
            )
        return count


def rehearse_removal(model: LambdaViTPreTrainedModel, amount: RemovalAmount, fold: bool) -> None:
    """
    Remove and fold in a copy that has shapes only, so that what cannot work is known before any training.

    Raises:
        ValueError: with the reason.
    """
    if not isinstance(model, LambdaViTPreTrainedModel):
        raise ValueError(_what_to_do_with(model))
    count = amount.count(model)
    # Of as many layers, the first ones take the largest factors into the weights.
    layers = model.config.kept_layers[:count] if amount.removed_layers is None else amount.removed_layers
    rehearsal = _copy_of_shapes(model.base_model)
    try:
        rehearsal.remove_attention(layers)
        if fold:
            rehearsal.fold_removed_attention()
    except ValueError as error:
        raise ValueError(f"Removal would fail at the end of training: {error}") from error


def _what_to_do_with(model) -> str:
    name = type(model).__name__
    if hasattr(model, "peft_config"):
        return (
            f"Attention layers are removed from a LambdaViT itself, not from the {name} around it: removal would drop"
            " base weights that the adapters are added to. Train the adapters, `merge_and_unload()`, then remove."
        )
    return (
        f"EntropyGuidedRemovalCallback needs a LambdaViT model, got {name}. Load it with"
        " `LambdaViTForImageClassification.from_pretrained`."
    )


def _copy_of_shapes(model: nn.Module) -> nn.Module:
    """A copy without values, on the meta device; with values in float16, where folding depends on them."""
    shapes = {
        id(parameter): nn.Parameter(parameter.detach().to("meta"), requires_grad=False)
        for parameter in model.parameters()
        if parameter.is_floating_point() and parameter.dtype is not torch.float16
    }
    return copy.deepcopy(model, shapes)


def _fraction(value) -> float:
    if isinstance(value, bool) or not 0.0 <= float(value) <= 1.0:
        raise ValueError(f"`removal_ratio` is a fraction of the attention layers, in [0, 1]; got {value!r}.")
    return float(value)


def _count(value) -> int:
    try:
        count = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        count = None
    if count is None or count < 0:
        raise ValueError(f"`num_removed_layers` must be an integer of 0 or more, got {value!r}.")
    return count


def _layers(values) -> list[int]:
    """Sorted, as plain integers."""
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise ValueError(f"`removed_layers` must be a list of 0-based layer indices, got {values!r}.")
    values = list(values)
    try:
        layers = [None if isinstance(value, bool) else operator.index(value) for value in values]
    except TypeError as error:
        raise ValueError(f"`removed_layers` must hold integers, got {values}.") from error
    if None in layers:
        raise ValueError(f"`removed_layers` must hold integers, got {values}.")
    return sorted(layers)
