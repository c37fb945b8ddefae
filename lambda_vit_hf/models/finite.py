"""Is every weight a number, and does the model answer in numbers?"""

import math

import torch
from torch import nn


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether no value is NaN or infinite; in one pass, without a mask of the tensor's size."""
    if tensor.is_meta or not tensor.is_floating_point():
        return True
    # The sum of finite values can only overflow in half precision.
    return math.isfinite(tensor.sum(dtype=torch.float64).item())


def not_finite(tensors: dict[str, torch.Tensor]) -> list[str]:
    """Names of the tensors that hold NaN or infinity."""
    return [name for name, tensor in tensors.items() if not is_finite(tensor)]


@torch.no_grad()
def check_finite(model: nn.Module, name: str) -> None:
    """
    Refuse a model that must not be called finished: its weights, and what it says of two images of noise.

    Args:
        model ([`LambdaPreTrainedModel`]): with weights on one device.
        name (`str`): how to call it in the message.

    Raises:
        FloatingPointError: naming the weights, or saying that the answer is not finite.
    """
    damaged = not_finite(model.state_dict())
    if damaged:
        raise FloatingPointError(
            f"{len(damaged)} weights of {name} hold NaN or infinity: {', '.join(damaged[:4])}. Nothing was written:"
            " take an earlier checkpoint, or train with a lower learning rate."
        )
    parameter, size, was_training = next(model.parameters()), model.config.image_size, model.training
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(2, model.config.num_channels, height, width, generator=generator)
    answer = model.eval()(noise.to(parameter.device, parameter.dtype), return_dict=True)
    model.train(was_training)
    if not all(is_finite(value) for value in answer.values() if isinstance(value, torch.Tensor)):
        raise FloatingPointError(
            f"{name} gives NaN or infinity for an image, though its weights are finite: they are too large for"
            f" {parameter.dtype}. Nothing was written: take an earlier checkpoint."
        )
