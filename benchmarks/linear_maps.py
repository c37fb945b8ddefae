"""Layers whose attention linear maps replace best; see `lambda_vit_hf.fit_linear_maps`."""

import copy

import torch

from lambda_vit_hf import fit_linear_maps
from lambda_vit_hf.selection.linear_maps import change_by_replacement
from lambda_vit_hf.selection.output_change import OutputChange
from lambda_vit_hf.selection.strategies import greedy


def with_linear_maps(model, calibration: torch.Tensor, layers: list[int], autocast_dtype: str | None = None):
    """A copy of a model with linear maps, fitted on these images, in the place of the attention of some layers."""
    thinner = copy.deepcopy(model)
    maps = fit_linear_maps(model, calibration, layers, autocast_dtype=autocast_dtype, disable_tqdm=True)
    thinner.replace_attention(maps)
    return thinner


def change_by_linear_maps(
    model, calibration: torch.Tensor, sets: list[list[int]], autocast_dtype: str | None = None
) -> list[OutputChange]:
    """What maps in the place of the attention of each set change: they are fitted on one half of the images
    `(images, channels, height, width)`, and the change is that on the other half."""
    fitted, others = calibration[::2], calibration[1::2]
    return [
        change_by_replacement(
            model, with_linear_maps(model, fitted, layers, autocast_dtype), others, autocast_dtype=autocast_dtype
        )
        for layers in sets
    ]


def choose_for_linear_maps(
    model, calibration: torch.Tensor, number: int, autocast_dtype: str | None = None
) -> list[int]:
    """Greedily, those with whose maps the class probabilities stay nearest to the whole model's (KL)."""

    def changes(sets: list[list[int]]) -> list[float]:
        found = change_by_linear_maps(model, calibration, sets, autocast_dtype)
        return [change.divergence for change in found]

    return greedy(model.config.kept_layers, number, changes)
