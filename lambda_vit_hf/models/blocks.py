"""One block, of any family: attention as it is, diluted, off or removed, then (merging of tokens, and) an MLP.

Every pre-norm vision transformer of transformers has the block `x + scale1(attention(norm1(x)))`, then
`x + scale2(mlp(norm2(x)))`. A [`BlockDescription`] names these modules; [`RemovableAttention`] makes of such a block
one whose attention can fade and go. Shapes: `(batch, tokens, hidden)`.

Source: Lin et al., "MLP Can Be A Good Transformer Learner", CVPR 2024, section 3.3.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from .attention import attend, project
from .mapped_attention import MappedAttention
from .token_merging import TokenFlow, proportional_attention


@dataclass(frozen=True)
class BlockDescription:
    """
    Where the parts of a family's block are.

    Args:
        attention_norm, attention (`str`): the first half, in order. Attention has `q_proj`, `k_proj` and `v_proj`.
        mlp_norm, mlp (`str`): the second half, in order.
        attention_end (`str`): the linear layer within `attention` whose output leaves it.
        mlp_ends (`tuple[str, ...]`): the same within `mlp`; the first of these names that it has.
        attention_scale, mlp_scale (`str`, *optional*): LayerScale on each branch.
        drops (`tuple[str, ...]`): dropout and stochastic depth on both branches, in order.
        eager_attention (`Callable`): the family's attention without a fused kernel.
        rotate (`Callable`, *optional*): `(query, key, cos, sin) -> (query, key)` of rotary position embeddings.
    """

    attention_norm: str
    attention: str
    mlp_norm: str
    mlp: str
    attention_end: str
    mlp_ends: tuple[str, ...]
    eager_attention: Callable
    attention_scale: str | None = None
    mlp_scale: str | None = None
    drops: tuple[str, ...] = ()
    rotate: Callable | None = None


class RemovableAttention:
    """
    Mixin in front of a family's block of transformers: its attention can fade, be off, or be gone.

    Differences from the block of transformers:

    - `attention_lambda`, a scalar buffer saved with the weights, weighs attention against what it fades to: the
      identity (`config.fade_to`; paper, equation 7), `x = (2 - lambda) * x + lambda * Attention(LayerNorm(x))`, or
      nothing (`"skip"`), `x = x + lambda * Attention(LayerNorm(x))`. 1 is the ordinary block, to the bit; at 0
      attention is not computed. The buffer is the only place that knows lambda.
    - Without attention (`config.attention_flags[layer_index]` is `False`) there are no attention weights, no first
      LayerNorm, no first LayerScale and no lambda: `x = 2 * x`, or nothing at all in a folded model or after "skip".
      With `config.fade_to` `"linear"` a [`MappedAttention`] is there, `x = x + W n + V mean(n) + b`.
    - Between attention and MLP, tokens are merged if the caller passes a [`TokenFlow`].

    Args:
        config: of the family, with the fields of [`RemovalConfigMixin`].
        layer_index (`int`): 0 is nearest to the image.
    """

    block: BlockDescription

    def __init__(self, config, layer_index: int):
        super().__init__(config)
        self.config, self.layer_index = config, layer_index
        self.register_buffer("attention_lambda", torch.ones(()))
        self.mapped_attention: MappedAttention | None = None
        self._noted: tuple[torch.Tensor | None, int, str] = (None, 0, "kept")
        if not config.attention_flags[layer_index]:
            self.drop_attention(with_map=config.fade_to == "linear")
        self.register_load_state_dict_post_hook(note_attention_state)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        token_flow: TokenFlow | None = None,
        **kwargs,
    ) -> torch.Tensor:
        if token_flow is None:
            return self.feed_forward(self.mix_tokens(hidden_states, attention_mask, **kwargs))
        hidden_states = self.feed_forward(self._mix_and_merge(hidden_states, token_flow, **kwargs))
        return token_flow.restore(self.layer_index, hidden_states)

    def mix_tokens(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs
    ) -> torch.Tensor:
        """First half of the block: attention, or what is in its place. `(batch, tokens, hidden)`."""
        if self.mapped_attention is not None:
            return hidden_states + self._scale_and_drop(self.mapped_attention(hidden_states), "attention_scale")
        state = self.attention_state
        if state in ("off", "removed", "folded"):
            if state == "off":
                hidden_states = self._mark_unused_attention(hidden_states)
            return 2 * hidden_states if state != "folded" and self.config.fade_to == "identity" else hidden_states
        branch, _ = self._part("attention")(
            self._part("attention_norm")(hidden_states), attention_mask=attention_mask, **kwargs
        )
        return self._weigh_by_lambda(hidden_states, self._scale_and_drop(branch, "attention_scale"), state)

    def feed_forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Second half of the block, the MLP with its residual. `(batch, tokens, hidden)`."""
        return self.mlp_branch(hidden_states) + hidden_states

    def mlp_branch(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """What the MLP adds to the stream. `(batch, tokens, hidden)`."""
        return self._scale_and_drop(self._part("mlp")(self._part("mlp_norm")(hidden_states)), "mlp_scale")

    def attention_branch(self, hidden_states: torch.Tensor, **kwargs) -> torch.Tensor:
        """What whole attention adds to the stream. `(batch, tokens, hidden)`."""
        branch, _ = self._part("attention")(self._part("attention_norm")(hidden_states), attention_mask=None, **kwargs)
        return self._scale_and_drop(branch, "attention_scale")

    def attention_maps(self, hidden_states: torch.Tensor, **kwargs) -> torch.Tensor | None:
        """Attention probabilities `(batch, heads, tokens, tokens)`; `None` where its implementation is not eager."""
        normed = self._part("attention_norm")(hidden_states)
        return self._part("attention")(normed, attention_mask=None, **kwargs)[1]

    def _mix_and_merge(self, hidden_states: torch.Tensor, flow: TokenFlow, **kwargs) -> torch.Tensor:
        """`mix_tokens`, then merging; or only the class token from here on."""
        index, sizes = self.layer_index, flow.sizes.get(self.layer_index)
        flow.keep(index)
        if self.mapped_attention is not None:
            only_class_token = flow.class_token_from == index
            branch = self._scale_and_drop(
                self.mapped_attention(hidden_states, sizes, only_class_token), "attention_scale"
            )
            return (hidden_states[:, :1] if only_class_token else hidden_states) + branch
        state = self.attention_state
        if state not in ("kept", "diluting"):
            # Without attention tokens do not see each other: the class token is alone by now, or all are there.
            return self.mix_tokens(hidden_states)
        attention, normed = self._part("attention"), self._part("attention_norm")(hidden_states)
        mask = proportional_attention(sizes, hidden_states.dtype)
        if flow.class_token_from == index:
            branch, _ = attention(normed, attention_mask=mask, only_class_token=True, **kwargs)
            return self._weigh_by_lambda(hidden_states[:, :1], self._scale_and_drop(branch, "attention_scale"), state)
        merged = flow.schedule[index] > 0
        if merged and not flow.is_recorded:
            branch, _, keys = attend(attention, self.block, *project(attention, normed), mask, **kwargs)
        else:
            branch, _ = attention(normed, attention_mask=mask, **kwargs)  # as a module, which hooks listen to
        mixed = self._weigh_by_lambda(hidden_states, self._scale_and_drop(branch, "attention_scale"), state)
        if merged:
            keys = attend(attention, self.block, *project(attention, normed))[2] if flow.is_recorded else keys
            mixed = flow.merge(index, mixed, keys)
        return mixed

    def _weigh_by_lambda(self, hidden_states: torch.Tensor, branch: torch.Tensor, state: str) -> torch.Tensor:
        # A graph must not read the buffer, so it takes the general form, which is right for every lambda; but for a
        # model that is prepared for inference: its lambda cannot change any more.
        is_fixed = not torch.compiler.is_compiling() or hasattr(self._part("attention"), "qkv_proj")
        if state == "kept" and is_fixed:
            return branch + hidden_states
        if self.config.fade_to != "identity":
            return hidden_states + self.attention_lambda * branch
        return (2 - self.attention_lambda) * hidden_states + self.attention_lambda * branch

    def _scale_and_drop(self, branch: torch.Tensor, scale: str) -> torch.Tensor:
        for module in (self._part(scale), *(getattr(self, name) for name in self.block.drops)):
            branch = branch if module is None else module(branch)
        return branch

    def _part(self, role: str) -> nn.Module | None:
        name = getattr(self.block, role)
        return None if name is None else getattr(self, name)

    @property
    def has_attention(self) -> bool:
        """Whether this layer still has attention weights, whatever its lambda."""
        return self._part("attention") is not None

    @property
    def attention_state(self) -> str:
        """
        `"kept"` (lambda = 1), `"diluting"` or `"off"` (lambda = 0); without attention `"removed"`, `"folded"` where
        the doubling is in the weights, or `"mapped"` where a linear map is in its place.
        """
        if self.mapped_attention is not None:
            return "mapped"
        if not self.has_attention:
            return "folded" if self.config.fold_removed else "removed"
        buffer = self.attention_lambda
        if buffer.is_meta or torch.compiler.is_compiling():
            return self._noted[2]  # reading the buffer is impossible, or would break the graph
        if buffer.device.type == "cpu" or buffer.is_inference():
            state = _state_at(buffer.item())
            if state != self._noted[2]:
                note_attention_state(self)
            return state
        # Elsewhere reading waits for all that the device has to do: only where the buffer is another, or was changed.
        if self._noted[0] is not buffer or self._noted[1] != buffer._version:
            note_attention_state(self)
        return self._noted[2]

    @torch.no_grad()
    def set_attention_lambda(self, value: float) -> None:
        """Set lambda, in [0, 1], of a layer that has attention."""
        self.attention_lambda.fill_(value)
        note_attention_state(self, value)

    def drop_attention(self, with_map: bool = False) -> None:
        """Take out attention, its LayerNorm and LayerScale, and lambda; put a linear map there, or nothing."""
        for role in ("attention", "attention_norm", "attention_scale"):
            if self._part(role) is not None:
                setattr(self, getattr(self.block, role), None)
        self.attention_lambda = None
        if with_map:
            like = self.stream_norms()[-1].weight
            self.mapped_attention = MappedAttention(self.config.hidden_size, self.config.layer_norm_eps)
            self.mapped_attention.to(like.device, like.dtype)

    def attention_parameters(self) -> list[nn.Parameter]:
        """Parameters that go when this layer's attention is removed: of attention, LayerNorm and LayerScale."""
        parts = (self._part(role) for role in ("attention", "attention_norm", "attention_scale"))
        return [parameter for part in parts if part is not None for parameter in part.parameters()]

    def stream_ends(self) -> list[tuple[nn.Module | None, nn.Module]]:
        """LayerScale (or `None`) and last linear layer of each branch that adds to the stream."""
        mlp = self._part("mlp")
        ends = [(self._part("mlp_scale"), next(getattr(mlp, n) for n in self.block.mlp_ends if hasattr(mlp, n)))]
        if self.has_attention:
            ends.insert(0, (self._part("attention_scale"), getattr(self._part("attention"), self.block.attention_end)))
        return ends

    def stream_norms(self) -> list[nn.LayerNorm]:
        """The LayerNorms that read the stream."""
        return [norm for norm in (self._part("attention_norm"), self._part("mlp_norm")) if norm is not None]

    def _mark_unused_attention(self, hidden_states: torch.Tensor) -> torch.Tensor:
        unused = [parameter for parameter in self.attention_parameters() if parameter.requires_grad]
        if not (self.training and unused and torch.is_grad_enabled()):
            return hidden_states
        return _WithoutGradient.apply(hidden_states, *unused)

    def extra_repr(self) -> str:
        return f"attention {self.attention_state}"


def note_attention_state(layer: RemovableAttention, value=None) -> None:
    """
    Let a layer note the state that its lambda means, for compiled graphs, exports and other devices than the CPU.

    Args:
        layer ([`RemovableAttention`]): the layer.
        value (`float`, *optional*): of its lambda, where it is known; else the buffer is read.
    """
    buffer = layer.attention_lambda
    if buffer is not None and not buffer.is_meta:
        value = value if isinstance(value, (int, float)) else buffer.item()
        layer._noted = (buffer, 0 if buffer.is_inference() else buffer._version, _state_at(value))


def _state_at(value: float) -> str:
    return "kept" if value == 1.0 else "off" if value == 0.0 else "diluting"


class _WithoutGradient(torch.autograd.Function):
    """Passes `hidden_states` on and tells autograd that `parameters` were seen, but have no gradient.

    DistributedDataParallel waits for every parameter; those of an attention that is no longer computed would make it
    fail. Multiplying them by zero would also do, at the price of reading them, and of NaN where a weight is infinite.
    """

    @staticmethod
    def forward(ctx, hidden_states, *parameters):
        ctx.num_parameters = len(parameters)
        return hidden_states.view_as(hidden_states)

    @staticmethod
    def backward(ctx, gradient):
        return gradient, *[None] * ctx.num_parameters
