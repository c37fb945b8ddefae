"""How many attention layers a training removes, or which; and whether that will work, known before it begins."""

import copy
import operator
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from ..models.folding import check_layer_indices
from ..models.pretrained_model import LambdaPreTrainedModel
from ..selection.checks import check_amount, check_is_ours, count_layers


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
        names = ("removal_ratio", "num_removed_layers", "removed_layers")
        if sum(getattr(self, name) is not None for name in names) != 1:
            raise ValueError(f"Give exactly one of {', '.join(f'`{name}`' for name in names)}.")
        if self.removed_layers is not None:
            object.__setattr__(self, "removed_layers", _plain_layers(self.removed_layers))
            return
        check_amount(self.num_removed_layers, self.removal_ratio)
        for name, kind in (("removal_ratio", float), ("num_removed_layers", int)):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, kind(getattr(self, name)))

    def count(self, model: LambdaPreTrainedModel) -> int:
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
        return count_layers(len(kept), self.num_removed_layers, self.removal_ratio)


def rehearse_removal(
    model: LambdaPreTrainedModel, amount: RemovalAmount, fold: bool, fade_to: str | None = None
) -> None:
    """
    Remove and fold in a copy that has shapes only, so that what cannot work is known before any training.

    Raises:
        ValueError: with the reason.
    """
    check_is_ours(model)
    count = amount.count(model)
    # Of as many layers, the first ones take the largest factors into the weights.
    layers = model.config.kept_layers[:count] if amount.removed_layers is None else amount.removed_layers
    rehearsal = _copy_of_shapes(model.base_model)
    try:
        if fade_to is not None and count:
            rehearsal.set_fade_to(fade_to)
        rehearsal.remove_attention(layers)
        if fold:
            rehearsal.fold_removed_attention()
    except ValueError as error:
        raise ValueError(f"Removal would fail at the end of training: {error}") from error


def _copy_of_shapes(model: nn.Module) -> nn.Module:
    """A copy without values, on the meta device; with values in float16, where folding depends on them."""
    shapes = {
        id(parameter): nn.Parameter(parameter.detach().to("meta"), requires_grad=False)
        for parameter in model.parameters()
        if parameter.is_floating_point() and parameter.dtype is not torch.float16
    }
    return copy.deepcopy(model, shapes)


def _plain_layers(values) -> list[int]:
    """Sorted, as plain integers."""
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise ValueError(f"`removed_layers` must be a list of 0-based layer indices, got {values!r}.")
    values = list(values)
    try:
        plain = [operator.index(value) for value in values]  # arrays, too, say only here that they are no integers
    except TypeError:
        plain = None
    if plain is None or any(isinstance(value, bool) for value in values):
        raise ValueError(f"`removed_layers` must hold integers, got {values}.")
    return sorted(plain)
