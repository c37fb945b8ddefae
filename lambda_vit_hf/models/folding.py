"""Folding: the doubling that a removed attention layer leaves behind, absorbed exactly by the weights that follow.

A removed attention leaves the identity behind, and its block starts with `x = 2 * x`. Let `scale` be the product of
these factors up to and including a block. Storing `x / scale` instead of `x` makes every doubling vanish: each branch
that adds to the stream is divided by `scale`, in its LayerScale or else in its last linear layer, and each LayerNorm,
which is scale-free but for its epsilon, gets `eps / scale**2`. Powers of two are exact in floating point, so nothing
is rounded. What enters the first block is multiplied by a power of two besides, which every `scale` is then divided
by: this centres the range for float16.

Source: the doubling is Lin et al., CVPR 2024, section 3.3; the folding is this package's.
"""

import operator
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
    layers = [_as_index(layer) for layer in layers]
    for layer in layers:
        if not 0 <= layer < num_layers:
            raise ValueError(f"Layer {layer} is out of range: the model has layers 0 to {num_layers - 1}.")
    repeated = sorted({layer for layer in layers if layers.count(layer) > 1})
    if repeated:
        raise ValueError(f"`layers` names {repeated} more than once: {layers}.")
    return sorted(layers)


def _as_index(layer) -> int:
    """An `int` of any integer, numpy's too."""
    try:
        index = operator.index(layer)
    except TypeError:
        index = None
    if index is None or isinstance(layer, bool):
        raise ValueError(f"`layers` must hold integers, got {layer!r}.")
    return index


def residual_scales(attention_flags: Sequence[bool], exponent: int = 0) -> list[float]:
    """
    What the residual stream is divided by in a folded model, block by block: 2 to the number of removed attention
    layers at or before each block, divided by `2**exponent`. The last entry also holds for the final LayerNorm.
    """
    scales, scale = [], 2.0**-exponent
    for has_attention in attention_flags:
        scale = scale if has_attention else 2 * scale
        scales.append(scale)
    return scales


def centred_exponent(attention_flags: Sequence[bool]) -> int:
    """
    Power of two by which folding multiplies the embeddings, so that the weights behind them are divided by less: half
    the number of removed layers, at most 4. For float32 and bfloat16 it makes no difference.
    """
    # float16 is exact from 2**-14 to 2**16. Weights are around 2**-6, so they stand a division by 2**8. The stream of
    # a ViT has single values of hundreds or thousands, so it stands a multiplication by 2**4.
    return min(list(attention_flags).count(False) // 2, 4)


@torch.no_grad()
def fold_encoder_(entry: nn.Module, layers: Sequence[nn.Module], divisors: Sequence[float], exponent: int = 0) -> None:
    """
    Store a stream that is smaller by powers of two, in place: divide what adds to it.

    Epsilons are not touched here: they follow from the config (see `folded_layer_norm_eps`).

    Args:
        entry (`nn.Module`): what gives the first block its input, linear in all its parameters (embeddings, or a
            LayerNorm behind them). Multiplied by `2**exponent`.
        layers (`Sequence[RemovableAttention]`): the blocks.
        divisors (`Sequence[float]`): per block, a power of two.
        exponent (`int`, *optional*, defaults to 0): see `centred_exponent`.

    Raises:
        ValueError: if a weight leaves the range of its dtype (float16), or if an adapter or a quantised layer stands
            in the place of a plain one. Nothing is changed then.
    """
    quotients = []
    if exponent:
        for name, module in entry.named_modules():
            if any(True for _ in module.parameters(recurse=False)):
                _check_plain(f"the embeddings ({name or 'themselves'})", module)
        quotients += [(p, _exact_quotient("the embeddings", p, 2.0**-exponent)) for p in entry.parameters()]
    for index, (layer, divisor) in enumerate(zip(layers, divisors, strict=True)):
        for scale, end in layer.stream_ends() if divisor != 1 else ():
            quotients += _divided_branch(f"layer {index}", scale, end, divisor)
    for parameter, quotient in quotients:
        parameter.copy_(quotient)


def _divided_branch(where: str, scale: nn.Module | None, end: nn.Module, divisor: float) -> list[tuple]:
    """Parameters of a branch and their new values: those of its LayerScale, where that is exact, else of its end."""
    if scale is not None and all(_is_exact(parameter, divisor) for parameter in scale.parameters()):
        return [(parameter, parameter / divisor) for parameter in scale.parameters()]
    _check_plain(where, end)
    return [(parameter, _exact_quotient(where, parameter, divisor)) for parameter in end.parameters()]


def _is_exact(parameter: torch.Tensor, divisor: float) -> bool:
    return parameter.is_meta or torch.equal((parameter / divisor) * divisor, parameter)


def _check_plain(where: str, module: nn.Module) -> None:
    is_plain = type(module).__module__.startswith(("torch.nn.", "transformers.models."))
    if not is_plain or not all(parameter.is_floating_point() for parameter in module.parameters()):
        raise ValueError(
            f"Folding would not keep the function of {where}: a {type(module).__name__} of {type(module).__module__}"
            " stands in the place of a plain layer. Merge adapters into the weights first, and quantise after folding."
        )


def _exact_quotient(where: str, parameter: torch.Tensor, divisor: float) -> torch.Tensor:
    quotient = parameter / divisor
    error = (quotient * divisor - parameter).abs()
    # float16 has so few exponents that trained weights reach its subnormals before any division. An error there is
    # allowed up to the rounding of the tensor's largest value; other formats must be exact.
    allowed = parameter.abs().max() * 2.0**-11 if parameter.dtype is torch.float16 else 0.0
    if not (quotient.is_meta or (error <= allowed).all()):
        raise ValueError(
            f"Folding divides weights of {where} by {divisor:g}, which {parameter.dtype} cannot hold. Fold in float32"
            " or bfloat16, then convert."
        )
    return quotient


def folded_layer_norm_eps(config) -> list[float]:
    """
    LayerNorm epsilon of each block, by config: `layer_norm_eps / scale**2` in a folded model, else `layer_norm_eps`.
    The last entry also holds for the final LayerNorm.
    """
    if not config.fold_removed:
        return [config.layer_norm_eps] * config.num_hidden_layers
    scales = residual_scales(config.attention_flags, config.fold_exponent)
    return [config.layer_norm_eps / scale**2 for scale in scales]
