"""Removal of attention layers, exactly: drop the weights, fold the identity into its neighbours.

A removed attention leaves the identity behind, and its block starts with `x = 2 * x`. Let `scale` be the product of
these factors up to and including a block. Storing `x / scale` instead of `x` makes every doubling vanish: each branch
that adds to the stream is divided by `scale` in its last linear layer, and each LayerNorm, which is scale-free but for
its epsilon, gets `eps / scale**2`. Powers of two are exact in floating point, so nothing is rounded.

Source: the doubling is Lin et al., CVPR 2024, section 3.3; the folding is this package's.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import nn


def check_layer_indices(layers: Iterable[int], num_layers: int) -> list[int]:
    """
    Checked and sorted layer indices.

    Args:
        layers (`Iterable[int]`): 0-based layer indices, each at most once.
        num_layers (`int`): Number of layers of the model.

    Raises:
        ValueError: if an index is no integer, is out of range, or occurs twice.
    """
    if isinstance(layers, (int, str)) or not isinstance(layers, Iterable):
        raise ValueError(f"`layers` must be a list of 0-based layer indices, got {layers!r}.")
    layers = list(layers)
    for layer in layers:
        if isinstance(layer, bool) or not isinstance(layer, int):
            raise ValueError(f"`layers` must hold integers, got {layer!r} in {layers}.")
        if not 0 <= layer < num_layers:
            raise ValueError(f"Layer {layer} is out of range: the model has layers 0 to {num_layers - 1}.")
    repeated = sorted({layer for layer in layers if layers.count(layer) > 1})
    if repeated:
        raise ValueError(f"`layers` names {repeated} more than once: {layers}.")
    return sorted(layers)


def residual_scales(attention_flags: Sequence[bool]) -> list[int]:
    """
    Factor by which removed layers have scaled the residual stream, block by block: 2 to the number of removed
    attention layers at or before each block. The last entry also holds for the final LayerNorm.
    """
    scales, scale = [], 1
    for has_attention in attention_flags:
        scale = scale if has_attention else 2 * scale
        scales.append(scale)
    return scales


@torch.no_grad()
def fold_encoder_(layers: Sequence[nn.Module], newly_removed: Sequence[bool]) -> None:
    """
    Absorb the doubling of `newly_removed` layers into the weights of an encoder, in place.

    Epsilons are not touched here: they follow from the config (see `folded_layer_norm_eps`).

    Args:
        layers (`Sequence[nn.Module]`): ViT layers with `.mlp.fc2`, and `.attention.o_proj` where attention is kept.
        newly_removed (`Sequence[bool]`): per layer, whether its doubling still has to be absorbed.

    Raises:
        ValueError: if a quotient leaves the range of the weights' dtype (float16 subnormals). Nothing is changed then.
    """
    scales = residual_scales([not removed for removed in newly_removed])
    quotients = []
    for index, (layer, scale) in enumerate(zip(layers, scales, strict=True)):
        if scale == 1:
            continue
        attention_end = [] if layer.attention is None else [layer.attention.o_proj]
        for linear in [*attention_end, layer.mlp.fc2]:
            for parameter in linear.parameters():
                quotient = parameter / scale
                if not torch.equal(quotient * scale, parameter):
                    raise ValueError(
                        f"Folding layer {index} divides its weights by {scale}, which {parameter.dtype} cannot hold"
                        " exactly. Fold in float32 or bfloat16, then convert."
                    )
                quotients.append((parameter, quotient))
    for parameter, quotient in quotients:
        parameter.copy_(quotient)


def folded_layer_norm_eps(config) -> list[float]:
    """
    LayerNorm epsilon of each block, by config: `layer_norm_eps / scale**2` in a folded model, else `layer_norm_eps`.
    The last entry also holds for the final LayerNorm.
    """
    if not config.fold_removed:
        return [config.layer_norm_eps] * config.num_hidden_layers
    return [config.layer_norm_eps / scale**2 for scale in residual_scales(config.attention_flags)]
