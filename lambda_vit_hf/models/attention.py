"""Attention from its three projections on, for callers that need more of it than its output.

Shapes: `(batch, tokens, hidden)`; in heads `(batch, heads, tokens, head width)`.
"""

import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


def attend(
    attention: nn.Module,
    block,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """
    What a family's attention computes of its projections, and the keys, which token merging compares.

    Args:
        attention (`nn.Module`): of transformers, or a [`StackedAttention`] made of it.
        block ([`BlockDescription`]): of its family.
        query, key, value (`torch.Tensor`): the projections; query may have fewer tokens than the others.
        attention_mask, position_embeddings, kwargs: as its `forward` takes them.

    Returns:
        Output, attention probabilities (eager only, else `None`), keys in heads.
    """
    query, key, value = (_in_heads(states, attention.head_dim) for states in (query, key, value))
    if block.rotate is not None:
        query, key = block.rotate(query, key, *position_embeddings)
    function = ALL_ATTENTION_FUNCTIONS.get_interface(attention.config._attn_implementation, block.eager_attention)
    dropout = getattr(attention, "attention_dropout", getattr(attention, "dropout", 0.0))
    output, probabilities = function(
        attention, query, key, value, attention_mask,
        dropout=dropout if attention.training else 0.0, scaling=scaling_of(attention), **kwargs,
    )  # fmt: skip
    return getattr(attention, block.attention_end)(output.flatten(2)), probabilities, key


def project(attention: nn.Module, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Query, key and value of all tokens."""
    if hasattr(attention, "qkv_proj"):
        return attention.qkv_proj(hidden_states).chunk(3, dim=-1)
    return attention.q_proj(hidden_states), attention.k_proj(hidden_states), attention.v_proj(hidden_states)


def scaling_of(attention: nn.Module) -> float:
    """What products of queries and keys are multiplied by."""
    return attention.scaling if hasattr(attention, "scaling") else attention.scale


def _in_heads(states: torch.Tensor, head_dim: int) -> torch.Tensor:
    return states.unflatten(-1, (-1, head_dim)).transpose(1, 2)
