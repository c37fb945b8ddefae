"""Does what is asked of a selection fit the model?"""

import dataclasses
import logging
import numbers

import torch

from ..models.pretrained_model import LambdaPreTrainedModel
from .config import SelectionConfig


logger = logging.getLogger(__name__)


def fit_to_model(config: SelectionConfig, model, warn: bool = False) -> SelectionConfig:
    """
    The options with `output` and `mask` named, which depend on the model's head and on what its attention fades to.

    Args:
        config ([`SelectionConfig`]): the options.
        model ([`LambdaPreTrainedModel`]): the model to select on.
        warn (`bool`, *optional*, defaults to `False`): say so where the output is not that of an untrained head.

    Raises:
        ValueError: if the model is none of ours or half-way diluted, or if the class head that is to be measured is
            missing or untrained.
    """
    check_model(model)
    is_untrained = model.newly_initialized_head
    if config.output == "class_head" and not model.has_class_head:
        raise ValueError(f"{type(model).__name__} has no class head: use `output='class_token'` or `'token_mean'`.")
    if config.output == "class_head" and is_untrained:
        raise ValueError(
            "The class head is newly initialized: its entropy says nothing about the model. Train it first, or use"
            " `output='class_token'`."
        )
    if config.output is None and is_untrained and warn:
        logger.warning(
            "The class head is newly initialized: layers are selected by the entropy of the class token instead."
        )
    output = "class_head" if model.has_class_head and not is_untrained else "class_token"
    mask = "skip" if model.config.fade_to == "linear" else model.config.fade_to
    return dataclasses.replace(config, output=config.output or output, mask=config.mask or mask)


def check_is_ours(model) -> None:
    """
    Raises:
        ValueError: if it is of no Lambda family.
    """
    if not isinstance(model, LambdaPreTrainedModel):
        name = type(model).__name__
        if hasattr(model, "get_base_model"):
            raise ValueError(
                f"Expected a model such as LambdaViT, got {name}: merge its adapters (`model.merge_and_unload()`), or"
                " pass `model.get_base_model()`."
            )
        modules = model.named_modules() if isinstance(model, torch.nn.Module) else ()
        inner = [path for path, module in modules if isinstance(module, LambdaPreTrainedModel)]
        hint = f"pass `model.{inner[0]}`" if inner else "load it with a class such as LambdaViTForImageClassification"
        raise ValueError(f"Expected a model such as LambdaViT, got {name}: {hint}.")


def check_model(model) -> None:
    """
    Raises:
        ValueError: if it is of no Lambda family, or half-way diluted.
    """
    check_is_ours(model)
    diluting = {layer: value for layer, value in enumerate(model.attention_lambdas) if value not in (None, 1.0)}
    if diluting:
        raise ValueError(
            f"The model is half-way diluted: lambda is not 1 in layers {diluting}. Resume that run from a checkpoint,"
            " or set lambda back with `model.set_attention_lambda(1.0, layers)`."
        )


def count_layers(num_candidates: int, num_removed_layers: int | None, removal_ratio: float | None) -> int:
    """
    How many layers to remove, from exactly one of a count and a ratio (rounded to the nearest count, halves up).

    Raises:
        ValueError: if both or none are given, if the ratio is outside [0, 1] or above 0 and rounds to no layer, or if
            no attention would be left.
    """
    check_amount(num_removed_layers, removal_ratio)
    if removal_ratio is not None:
        num_removed_layers = int(removal_ratio * num_candidates + 0.5)
        if num_removed_layers == 0 < removal_ratio:
            raise ValueError(
                f"`removal_ratio` {removal_ratio} of {num_candidates} attention layers rounds to 0: nothing would be"
                " removed. Give a larger ratio, or `num_removed_layers`."
            )
    if num_removed_layers >= num_candidates:
        raise ValueError(
            f"Cannot remove {num_removed_layers} of {num_candidates} attention layers: at least one must stay."
        )
    return int(num_removed_layers)


def check_amount(num_removed_layers: int | None, removal_ratio: float | None) -> None:
    """
    What can be checked of [`count_layers`] without a model.

    Raises:
        ValueError: if both or none are given, or one is out of range or no number.
    """
    if (num_removed_layers is None) == (removal_ratio is None):
        raise ValueError("Give exactly one of `num_removed_layers` and `removal_ratio`.")
    for name, value, kind, allowed in (
        ("num_removed_layers", num_removed_layers, numbers.Integral, "an integer of 0 or more"),
        ("removal_ratio", removal_ratio, numbers.Real, "a fraction of the attention layers, in [0, 1]"),
    ):
        if value is None:
            continue
        is_number = isinstance(value, kind) and not isinstance(value, bool)
        if not is_number or not value >= 0 or (kind is numbers.Real and value > 1):
            raise ValueError(f"`{name}` must be {allowed}; got {value!r}.")
