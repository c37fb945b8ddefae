"""Layers whose attention linear maps replace best; see `lambda_vit_hf.fit_linear_maps`."""

import copy

import torch

from lambda_vit_hf import fit_linear_maps
from lambda_vit_hf.selection.linear_maps import change_by_replacement
from lambda_vit_hf.selection.output_change import OutputChange
from lambda_vit_hf.selection.strategies import greedy


def with_linear_maps(model, calibration: torch.Tensor, layers: list[int]):
    """A copy of a model with linear maps, fitted on these images, in the place of the attention of some layers."""
    thinner = copy.deepcopy(model)
    thinner.replace_attention(fit_linear_maps(model, calibration, layers, disable_tqdm=True))
    return thinner


def change_by_linear_maps(model, calibration: torch.Tensor, sets: list[list[int]]) -> list[OutputChange]:
    """What maps in the place of the attention of each set change, on the images `(images, channels, height, width)`
    that they are fitted on."""
    return [change_by_replacement(model, with_linear_maps(model, calibration, layers), calibration) for layers in sets]


def choose_for_linear_maps(model, calibration: torch.Tensor, number: int) -> list[int]:
    """Greedily, those with whose maps the class probabilities stay nearest to the whole model's (KL)."""
    return greedy(
        model.config.kept_layers,
        number,
        lambda sets: [change.divergence for change in change_by_linear_maps(model, calibration, sets)],
    )
