"""Attention replaced by a linear map of each token, fitted in closed form: what a rival without training can do.

TOAST (arXiv 2410.04941) puts such maps in the place of whole blocks. The map of one layer costs a quarter of the
multiply-accumulates of the four linear layers of its attention; skipping costs nothing.
"""

from collections.abc import Sequence

import torch
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset

from lambda_vit_hf.data.dataset import collate
from lambda_vit_hf.selection.output_change import sum_of_changes
from lambda_vit_hf.selection.strategies import greedy


RIDGE = 1e-3  # of the mean square of the inputs


@torch.no_grad()
def fit_linear_maps(model, calibration: torch.Tensor, layers: Sequence[int]) -> dict[int, torch.Tensor]:
    """
    The least-squares maps from the normalized stream to what attention adds to it, from the image on: each is fitted
    on the stream that the maps below it leave.

    Args:
        model ([`LambdaPreTrainedModel`]): in eval mode.
        calibration (`torch.Tensor` of shape `(images, channels, height, width)`).
        layers (`Sequence[int]`): 0-based.

    Returns:
        `dict[int, torch.Tensor]`: of each layer, `(hidden + 1, hidden)`; the last row is the bias.
    """
    hidden_states, extra = model.embed(calibration.to(model.device, model.dtype))
    maps = {}
    for index, layer in enumerate(model.encoder_layers):
        if index in layers:
            inputs = _inputs(hidden_states).flatten(0, 1).double()
            branch = layer.attention_branch(hidden_states, **extra).flatten(0, 1).double()
            square = inputs.T @ inputs
            square.diagonal().add_(RIDGE * square.diagonal().mean())
            maps[index] = torch.linalg.solve(square, inputs.T @ branch).to(hidden_states.dtype)
        hidden_states = _block(layer, hidden_states, maps.get(index), extra)
    return maps


@torch.no_grad()
def choose_for_linear_maps(model, calibration: torch.Tensor, number: int) -> list[int]:
    """
    Greedily, the layers whose attention linear maps replace best: with which the class probabilities stay nearest to
    the whole model's (KL), on the images that the maps are fitted on.
    """
    pixel_values = calibration.to(model.device, model.dtype)
    whole = _logits(model, pixel_values, {})

    def changes(sets: list[list[int]]) -> list[float]:
        logits = (_logits(model, pixel_values, fit_linear_maps(model, calibration, layers)) for layers in sets)
        return [sum_of_changes(whole, one, of_classes=True)[0].item() for one in logits]

    return greedy(model.config.kept_layers, number, changes)


@torch.no_grad()
def top1_with_maps(model, images: Dataset, maps: dict[int, torch.Tensor], batch_size: int = 180) -> float:
    """Accuracy, in [0, 1], with these maps in the place of attention, of items with `pixel_values` and `labels`."""
    right = total = 0
    for batch in DataLoader(images, batch_size=batch_size, collate_fn=collate):
        answers = _logits(model, batch["pixel_values"].to(model.device, model.dtype), maps).argmax(dim=-1).cpu()
        right += int((answers == batch["labels"]).sum())
        total += int((batch["labels"] >= 0).sum())
    return right / total


def _logits(model, pixel_values: torch.Tensor, maps: dict[int, torch.Tensor]) -> torch.Tensor:
    hidden_states, extra = model.embed(pixel_values)
    for index, layer in enumerate(model.encoder_layers):
        hidden_states = _block(layer, hidden_states, maps.get(index), extra)
    return model.read_out(hidden_states, "class_head")


def _block(layer, hidden_states: torch.Tensor, linear_map: torch.Tensor | None, extra: dict) -> torch.Tensor:
    if linear_map is None:
        return layer.feed_forward(layer.mix_tokens(hidden_states, **extra))
    return layer.feed_forward(hidden_states + _inputs(hidden_states) @ linear_map)


def _inputs(hidden_states: torch.Tensor) -> torch.Tensor:
    normed = functional.layer_norm(hidden_states, hidden_states.shape[-1:])
    return torch.cat([normed, torch.ones_like(normed[..., :1])], dim=-1)
