"""Inference: the same function with less work, and the same checkpoint format.

Shapes: `(batch, tokens, hidden)`.
"""

import logging

import torch
from torch import nn

from .attention import attend, project, scaling_of
from .blocks import BlockDescription


logger = logging.getLogger(__name__)

_PROJECTIONS = ("q_proj", "k_proj", "v_proj")
_HOOKS = ("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks", "_forward_pre_hooks_with_kwargs")


class StackedAttention(nn.Module):
    """
    A family's attention, in evaluation mode, whose query, key and value come from one linear layer.

    Differences from the attention it is made of: `qkv_proj` in place of `q_proj`, `k_proj` and `v_proj`, though
    `state_dict` and `load_state_dict` go on using these three names; no dropout; on request the answer to the class
    token's query alone (which rotary position embeddings do not allow).

    Args:
        attention (`nn.Module`): of transformers, with three projections of one width.
        block ([`BlockDescription`]): of its family.
    """

    def __init__(self, attention: nn.Module, block: BlockDescription):
        super().__init__()
        # Hooks come along: transformers installs those that record attentions once per model, not per module.
        for name in _HOOKS:
            setattr(self, name, getattr(attention, name))
        self.config, self.head_dim, self.is_causal = attention.config, attention.head_dim, False
        self.scaling, self.block = scaling_of(attention), block
        with torch.no_grad():
            self.qkv_proj = _stack([getattr(attention, name) for name in _PROJECTIONS])
        setattr(self, block.attention_end, getattr(attention, block.attention_end))
        self.register_state_dict_post_hook(_split_projections)
        self.register_load_state_dict_pre_hook(_stack_projections)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        only_class_token: bool = False,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        Output `(batch, tokens, hidden)` and attention probabilities (eager only, else `None`). With
        `only_class_token` every token is a key, but the class token is the only query: `(batch, 1, hidden)`.
        """
        if only_class_token:
            projections = self._project_for_class_token(hidden_states)
        else:
            projections = project(self, hidden_states)
        return attend(self, self.block, *projections, attention_mask, **kwargs)[:2]

    def _project_for_class_token(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Query of the class token `(batch, 1, hidden)`, key and value of all tokens."""
        if type(self.qkv_proj) is not nn.Linear:  # quantised: has no weight to cut
            query, key, value = project(self, hidden_states)
            return query[:, :1], key, value
        width = self.qkv_proj.out_features // 3
        weight, bias = self.qkv_proj.weight, self.qkv_proj.bias
        query_bias, other_bias = (None, None) if bias is None else (bias[:width], bias[width:])
        query = nn.functional.linear(hidden_states[:, :1], weight[:width], query_bias)
        return query, *nn.functional.linear(hidden_states, weight[width:], other_bias).chunk(2, dim=-1)


class InferenceMixin:
    """`prepare_for_inference`, for every Lambda model."""

    is_prepared_for_inference = False
    class_token_only = False

    def prepare_for_inference(self, class_token_only: bool = True) -> "InferenceMixin":
        """
        Make a model in evaluation mode faster, once, in place; its logits stay equal up to rounding.

        - Removed attention is folded.
        - Query, key and value come from one linear layer; dropout and drop path are taken out.
        - Where a classifier reads the class token alone: from the last attention on, only the class token is computed,
          in a call that asks for no hidden states or attentions.

        `save_pretrained` goes on writing the standard format. The model cannot be trained or changed any more: load it
        again for that.

        Args:
            class_token_only (`bool`, *optional*, defaults to `True`): the last point.

        Returns:
            The model itself.

        Raises:
            ValueError: in training mode, while lambda is between 0 and 1 somewhere, or with adapters or quantised
                layers in place of linear ones.

        Example:

        ```python
        model = LambdaViTForImageClassification.from_pretrained("outputs/digits").prepare_for_inference()
        ```
        """
        if self.is_prepared_for_inference:
            return self
        if self.training:
            raise ValueError("`prepare_for_inference` needs a model in evaluation mode: call `model.eval()` first.")
        diluting = [i for i, layer in enumerate(self.encoder_layers) if layer.attention_state == "diluting"]
        if diluting:
            raise ValueError(f"Layers {diluting} have a lambda between 0 and 1: train on, or remove their attention.")
        capability = torch.backends.cpu.get_cpu_capability()
        if (self.device.type, self.dtype) == ("cpu", torch.bfloat16) and capability == "AVX2":
            logger.warning("This CPU (%s) has no instructions for bfloat16: float32 may be faster.", capability)
        attending = [layer for layer in self.encoder_layers if layer.has_attention]
        for layer in attending:
            _check_linear_layers(layer.get_submodule(layer.block.attention))
        if self.config.removed_layers:
            self.fold_removed_attention()
        for layer in attending:
            stacked = StackedAttention(layer.get_submodule(layer.block.attention), layer.block).eval()
            setattr(layer, layer.block.attention, stacked)
        for layer in self.encoder_layers:
            for name in layer.block.drops:
                setattr(layer, name, None)
        self.base_model.class_token_only = class_token_only and self.reads_class_token_only("class_head")
        self.is_prepared_for_inference = self.base_model.is_prepared_for_inference = True
        return self

    def train(self, mode: bool = True):
        """As `nn.Module.train`; ValueError for a model prepared for inference."""
        if mode:
            self._check_not_prepared()
        return super().train(mode)

    def _check_not_prepared(self) -> None:
        if self.is_prepared_for_inference:
            raise ValueError("This model is prepared for inference; to train or change it, load it again.")


def _check_linear_layers(attention: nn.Module) -> None:
    """ValueError where a query, key or value projection is no plain linear layer: stacking would lose what it does."""
    for name in _PROJECTIONS:
        projection = getattr(attention, name)
        if type(projection) is not nn.Linear:
            raise ValueError(
                f"{name} is a {type(projection).__name__} of {type(projection).__module__}, not torch's linear layer."
                " Merge adapters into the weights first, and quantise after `prepare_for_inference`."
            )
        is_offloaded = hasattr(projection, "_hf_hook") or projection.weight.is_meta
        if projection._forward_hooks or projection._forward_pre_hooks or is_offloaded:
            raise ValueError(f"{name} has hooks or is offloaded: stacking would lose them.")


def _stack(linears: list[nn.Linear]) -> nn.Linear:
    """One linear layer of several of one width; where only some have a bias, the others' is zero."""
    first, has_bias = linears[0], any(linear.bias is not None for linear in linears)
    with torch.device("meta"):
        stacked = nn.Linear(first.in_features, sum(linear.out_features for linear in linears), has_bias)
    values = {"weight": torch.cat([linear.weight for linear in linears])}
    if has_bias:
        values["bias"] = torch.cat(
            [
                linear.weight.new_zeros(linear.out_features) if linear.bias is None else linear.bias
                for linear in linears
            ]
        )
    for kind, value in values.items():
        setattr(stacked, kind, nn.Parameter(value, requires_grad=first.weight.requires_grad))
    stacked.has_bias = [linear.bias is not None for linear in linears]
    return stacked


def _split_projections(module, state_dict, prefix, _metadata):
    """Under the three names. Copies: a file of weights cannot hold overlapping tensors."""
    for kind, _ in module.qkv_proj.named_parameters():
        parts = state_dict.pop(f"{prefix}qkv_proj.{kind}").chunk(3)
        for name, part, has_bias in zip(_PROJECTIONS, parts, module.qkv_proj.has_bias, strict=True):
            if kind == "weight" or has_bias:
                state_dict[f"{prefix}{name}.{kind}"] = part.clone()


def _stack_projections(module, state_dict, prefix, *_):
    for kind, stacked in module.qkv_proj.named_parameters():
        parts = [state_dict.pop(f"{prefix}{name}.{kind}", None) for name in _PROJECTIONS]
        if any(part is not None for part in parts):
            zeros = stacked.new_zeros(stacked.shape[0] // 3) if kind == "bias" else None
            state_dict[f"{prefix}qkv_proj.{kind}"] = torch.cat([zeros if part is None else part for part in parts])
