"""A linear map in the place of attention: of each token, and of the mean of all tokens.

Shapes: `(batch, tokens, hidden)`.
"""

from typing import NamedTuple

import torch
from torch import nn


class LinearMap(NamedTuple):
    """
    What [`MappedAttention`] computes with.

    Attributes:
        token_weight, mean_weight: `(hidden, hidden)`, outputs first.
        bias: `(hidden,)`.
    """

    token_weight: torch.Tensor
    mean_weight: torch.Tensor
    bias: torch.Tensor


class MappedAttention(nn.Module):
    """
    `W n + V mean(n) + b`, where `n` is the stream behind a LayerNorm without weights and the mean is over the tokens.
    It keeps what attention adds whichever tokens attend to which, and loses the rest. `W` costs a quarter of the
    linear layers of attention; `V` is computed once for an image.

    Args:
        hidden_size (`int`): width of the stream.
        eps (`float`): of the LayerNorm.
    """

    def __init__(self, hidden_size: int, eps: float):
        super().__init__()
        self.eps = eps
        self.token_proj = nn.Linear(hidden_size, hidden_size)
        self.mean_proj = nn.Linear(hidden_size, hidden_size, bias=False)

    def normalize(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """What the map reads of the stream."""
        return nn.functional.layer_norm(hidden_states, hidden_states.shape[-1:], eps=self.eps)

    def forward(
        self, hidden_states: torch.Tensor, sizes: torch.Tensor | None = None, only_class_token: bool = False
    ) -> torch.Tensor:
        """
        Args:
            hidden_states (`torch.Tensor`): the stream.
            sizes (`torch.Tensor` of shape `(batch, tokens, 1)`, *optional*): of merged tokens, by which they count.
            only_class_token (`bool`, *optional*): the result for the first token alone, `(batch, 1, hidden)`.
        """
        tokens = self.normalize(hidden_states)
        if sizes is None:
            mean = tokens.mean(dim=1, keepdim=True)
        else:
            mean = ((tokens * sizes).sum(dim=1, keepdim=True) / sizes.sum(dim=1, keepdim=True)).to(tokens.dtype)
        return self.token_proj(tokens[:, :1] if only_class_token else tokens) + self.mean_proj(mean)

    @torch.no_grad()
    def set(self, values: LinearMap) -> None:
        """Take these values, in the dtype and on the device of the module."""
        self.token_proj.weight.copy_(values.token_weight)
        self.mean_proj.weight.copy_(values.mean_weight)
        self.token_proj.bias.copy_(values.bias)
