"""Inference: the same function with less work, and the same checkpoint format.

Shapes: `(batch, tokens, hidden)`.
"""

import torch
from torch import nn

from .blocks import LambdaViTAttention


_PROJECTIONS = ("q_proj", "k_proj", "v_proj")
_FACTS = ("config", "num_attention_heads", "head_dim", "attention_dropout", "scaling", "is_causal")
_HOOKS = ("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks", "_forward_pre_hooks_with_kwargs")


class StackedAttention(LambdaViTAttention):
    """
    Attention whose query, key and value come from one linear layer.

    Differences from `LambdaViTAttention`: `qkv_proj` in place of `q_proj`, `k_proj` and `v_proj`. `state_dict` and
    `load_state_dict` go on using these three names.
    """

    def __init__(self, attention: LambdaViTAttention):
        nn.Module.__init__(self)
        # Hooks come along: transformers installs those that record attentions once per model, not per module.
        for name in (*_FACTS, *_HOOKS):
            setattr(self, name, getattr(attention, name))
        with torch.no_grad():
            self.qkv_proj = _stack([getattr(attention, name) for name in _PROJECTIONS])
        self.o_proj = attention.o_proj
        self.register_state_dict_post_hook(_split_projections)
        self.register_load_state_dict_pre_hook(_stack_projections)

    def project(self, hidden_states: torch.Tensor, asking: torch.Tensor) -> tuple[torch.Tensor, ...]:
        if asking is hidden_states or type(self.qkv_proj) is not nn.Linear:  # quantised: has no weight to cut
            query, key, value = self.qkv_proj(hidden_states).chunk(3, dim=-1)
            return query[:, : asking.shape[1]], key, value
        width = self.qkv_proj.out_features // 3
        weight, bias = self.qkv_proj.weight, self.qkv_proj.bias
        query_bias, other_bias = (None, None) if bias is None else (bias[:width], bias[width:])
        query = nn.functional.linear(asking, weight[:width], query_bias)
        return query, *nn.functional.linear(hidden_states, weight[width:], other_bias).chunk(2, dim=-1)


class InferenceMixin:
    """`prepare_for_inference`, for every LambdaViT model."""

    is_prepared_for_inference = False

    def prepare_for_inference(self, class_token_only: bool = True) -> "InferenceMixin":
        """
        Make a model in evaluation mode faster, once, in place; its logits stay equal up to rounding.

        - Removed attention is folded.
        - Query, key and value come from one linear layer; dropout and drop path are taken out.
        - A classifier reads the class token alone. So from the last attention on, only the class token is computed, in
          a call that asks for no hidden states or attentions.

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
        >>> model = LambdaViTForImageClassification.from_pretrained("outputs/digits").prepare_for_inference()
        ```
        """
        if self.is_prepared_for_inference:
            return self
        if self.training:
            raise ValueError("`prepare_for_inference` needs a model in evaluation mode: call `model.eval()` first.")
        diluting = [i for i, layer in enumerate(self.encoder_layers) if layer.attention_state == "diluting"]
        if diluting:
            raise ValueError(f"Layers {diluting} have a lambda between 0 and 1: train on, or remove their attention.")
        _check_linear_layers(self.encoder_layers)
        if self.config.removed_layers:
            self.fold_removed_attention()
        for layer in self.encoder_layers:
            if layer.attention is not None:
                layer.attention = StackedAttention(layer.attention).eval()
            layer.dropout = layer.drop_path = None
        self.base_model.class_token_only = class_token_only and hasattr(self, "classifier")
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


def _check_linear_layers(layers: nn.ModuleList) -> None:
    """ValueError where a query, key or value projection is no plain linear layer: stacking would lose what it does."""
    for index, layer in enumerate(layers):
        for name in _PROJECTIONS if layer.attention is not None else ():
            projection = getattr(layer.attention, name)
            if type(projection) is not nn.Linear:
                raise ValueError(
                    f"{name} of layer {index} is a {type(projection).__name__}, not a linear layer. Merge adapters"
                    " into the weights first, and quantise after `prepare_for_inference`."
                )
            is_offloaded = hasattr(projection, "_hf_hook") or projection.weight.is_meta
            if projection._forward_hooks or projection._forward_pre_hooks or is_offloaded:
                raise ValueError(f"{name} of layer {index} has hooks or is offloaded: stacking would lose them.")


def _stack(linears: list[nn.Linear]) -> nn.Linear:
    first = linears[0]
    with torch.device("meta"):
        stacked = nn.Linear(first.in_features, sum(linear.out_features for linear in linears), first.bias is not None)
    for kind, parameter in first.named_parameters():
        values = torch.cat([getattr(linear, kind) for linear in linears])
        setattr(stacked, kind, nn.Parameter(values, requires_grad=parameter.requires_grad))
    return stacked


def _split_projections(module, state_dict, prefix, _metadata):
    """Under the three names. Copies: a file of weights cannot hold overlapping tensors."""
    for kind, _ in module.qkv_proj.named_parameters():
        parts = state_dict.pop(f"{prefix}qkv_proj.{kind}").chunk(3)
        for name, part in zip(_PROJECTIONS, parts, strict=True):
            state_dict[f"{prefix}{name}.{kind}"] = part.clone()


def _stack_projections(module, state_dict, prefix, *_):
    for kind, _ in module.qkv_proj.named_parameters():
        names = [f"{prefix}{name}.{kind}" for name in _PROJECTIONS]
        if all(name in state_dict for name in names):
            state_dict[f"{prefix}qkv_proj.{kind}"] = torch.cat([state_dict.pop(name) for name in names])
