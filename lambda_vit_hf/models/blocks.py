"""One block of a LambdaViT: attention as it is, diluted, off or removed, then (merging of tokens, and) an MLP.

Shapes: `(batch, tokens, hidden)`. Source: Lin et al., "MLP Can Be A Good Transformer Learner", CVPR 2024, section 3.3.
"""

import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.vit.modeling_vit import ViTAttention, ViTLayer, ViTMLP, eager_attention_forward

from .configuration_lambda_vit import LambdaViTConfig
from .token_merging import merge_tokens, proportional_attention


class LambdaViTDropPath(nn.Module):
    """Stochastic depth: drops a residual branch for whole images, in training only. Shape kept."""

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate

    def forward(self, branch: torch.Tensor) -> torch.Tensor:
        if self.rate == 0.0 or not self.training:
            return branch
        keep = torch.rand(branch.shape[0], *[1] * (branch.ndim - 1), device=branch.device) >= self.rate
        return branch * (keep.to(branch.dtype) / (1.0 - self.rate))

    def extra_repr(self) -> str:
        return f"rate={self.rate:.3f}"


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


class LambdaViTAttention(ViTAttention):
    """
    Attention, the same to the bit as `ViTAttention`.

    Differences from `ViTAttention`: on request it also gives its keys `(batch, heads, tokens, head width)`, which
    token merging compares, and the answer to the class token's query alone; `project` can be replaced.
    """

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        return_keys: bool = False,
        class_token_only: bool = False,
        **kwargs,
    ):
        """
        Output `(batch, tokens, hidden)`, attention probabilities (eager only, else `None`), and the keys on request.
        With `class_token_only` every token is a key, but the class token is the only query: `(batch, 1, hidden)`.
        """
        query, key, value = (
            states.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for states in self.project(hidden_states, hidden_states[:, :1] if class_token_only else hidden_states)
        )
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        output, probabilities = attend(
            self, query, key, value, attention_mask,
            dropout=self.attention_dropout if self.training else 0.0, scaling=self.scaling, **kwargs,
        )  # fmt: skip
        output = self.o_proj(output.flatten(2))
        return (output, probabilities, key) if return_keys else (output, probabilities)

    def project(self, hidden_states: torch.Tensor, asking: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Queries of the tokens `asking`, keys and values of all: each `(batch, tokens, hidden)`."""
        return self.q_proj(asking), self.k_proj(hidden_states), self.v_proj(hidden_states)


class LambdaViTLayer(ViTLayer):
    """
    One block: token mixing by attention (or what is left of it), then an MLP.

    Differences from `ViTLayer`:

    - `attention_lambda`, a scalar buffer saved with the weights, weighs attention against the identity
      (paper, equation 7): `x = (2 - lambda) * x + lambda * Attention(LayerNorm(x))`. 1 is the ordinary block; at 0
      attention is not computed.
    - Without attention (`config.attention_flags[layer_index]` is `False`) there are no attention weights, no first
      LayerNorm and no lambda: `x = 2 * x`, or nothing at all in a folded model.
    - Between attention and MLP, `merged_tokens` tokens are merged if the caller keeps count of their sizes.
    - Stochastic depth on both branches.
    """

    def __init__(self, config: LambdaViTConfig, layer_index: int):
        nn.Module.__init__(self)
        has_attention = config.attention_flags[layer_index]
        self.register_module("attention", LambdaViTAttention(config) if has_attention else None)
        self.register_module("layernorm_before", nn.LayerNorm(config.hidden_size) if has_attention else None)
        self.layernorm_after = nn.LayerNorm(config.hidden_size)
        self.mlp = ViTMLP(config)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.drop_path = LambdaViTDropPath(config.drop_path_rates()[layer_index])
        self.register_buffer("attention_lambda", torch.ones(()) if has_attention else None)
        self.attention_state = "kept" if has_attention else "removed"
        self.merged_tokens = 0  # set by the model, from the config
        self.register_load_state_dict_post_hook(read_attention_state)

    def forward(self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs):
        if kwargs.pop("keep_sizes", False):
            return self.shrink(hidden_states, **kwargs)
        return self.feed_forward(self.mix_tokens(hidden_states, attention_mask, **kwargs))

    def shrink(
        self,
        hidden_states: torch.Tensor,
        token_sizes: torch.Tensor | None = None,
        class_token_only: bool = False,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        The block where tokens get fewer: what `forward` does when called with `keep_sizes=True`.

        Args:
            hidden_states (`torch.Tensor` of shape `(batch, tokens, hidden)`): class token first.
            token_sizes (`torch.Tensor` of shape `(batch, tokens, 1)`, *optional*): patches each token stands for;
                `None` while nothing has merged.
            class_token_only (`bool`, *optional*, defaults to `False`): only the class token goes on after attention.

        Returns:
            `(batch, fewer tokens, hidden)`, and the sizes.
        """
        if token_sizes is not None:
            # Counts have no gradient; but reentrant gradient checkpointing gives one to all that a layer returns.
            token_sizes = token_sizes.detach()
        mask = proportional_attention(token_sizes, hidden_states.dtype)
        mixed, keys = self._mix(hidden_states, mask, class_token_only, **kwargs)
        if self.merged_tokens and self.attention_state == "kept" and not class_token_only:
            mixed, token_sizes = merge_tokens(mixed, token_sizes, keys, self.merged_tokens)
        return self.feed_forward(mixed), token_sizes

    def mix_tokens(self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs):
        """First half of the block: attention, diluted attention, doubling or nothing. `(batch, tokens, hidden)`."""
        return self._mix(hidden_states, attention_mask, **kwargs)[0]

    def _mix(self, hidden_states, attention_mask, class_token_only=False, **kwargs):
        """`mix_tokens`, and the keys of the attention or `None`."""
        # Without attention tokens do not see each other: the caller has the class token alone by then, or all of them.
        if self.attention_state == "folded":
            return hidden_states, None
        if self.attention_state == "removed":
            return 2 * hidden_states, None
        if self.attention_state == "off":
            return 2 * self._mark_unused_attention(hidden_states), None
        branch, _, keys = self.attention(
            self.layernorm_before(hidden_states), attention_mask,
            return_keys=True, class_token_only=class_token_only, **kwargs,
        )  # fmt: skip
        branch = self._drop(branch)
        hidden_states = hidden_states[:, :1] if class_token_only else hidden_states
        if self.attention_state == "kept":
            return branch + hidden_states, keys
        return (2 - self.attention_lambda) * hidden_states + self.attention_lambda * branch, keys

    def feed_forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Second half of the block, the MLP with its residual. `(batch, tokens, hidden)`."""
        return self._drop(self.mlp(self.layernorm_after(hidden_states))) + hidden_states

    def _drop(self, branch: torch.Tensor) -> torch.Tensor:
        # A model prepared for inference has neither module.
        return branch if self.dropout is None else self.drop_path(self.dropout(branch))

    def set_attention_lambda(self, value: float) -> None:
        """Set lambda, in [0, 1], of a layer that has attention."""
        self.attention_lambda.fill_(value)
        self.attention_state = _state_at(value)

    def attention_parameters(self) -> list[nn.Parameter]:
        """Parameters that go when this layer's attention is removed: the attention's and its LayerNorm's."""
        if self.attention is None:
            return []
        return [*self.attention.parameters(), *self.layernorm_before.parameters()]

    def _mark_unused_attention(self, hidden_states: torch.Tensor) -> torch.Tensor:
        unused = [parameter for parameter in self.attention_parameters() if parameter.requires_grad]
        if not (self.training and unused and torch.is_grad_enabled()):
            return hidden_states
        return _WithoutGradient.apply(hidden_states, *unused)

    def extra_repr(self) -> str:
        return f"attention {self.attention_state}"


def read_attention_state(layer: LambdaViTLayer, _incompatible_keys=None) -> None:
    """Bring `layer.attention_state` in line with the value of its lambda."""
    # Which branch to run is a Python attribute: reading the buffer in `forward` would wait for the GPU in every layer
    # and break compiled graphs. It is read again wherever the buffer can have changed.
    if layer.attention is not None and not layer.attention_lambda.is_meta:
        layer.attention_state = _state_at(layer.attention_lambda.item())


def _state_at(value: float) -> str:
    return "kept" if value == 1.0 else "off" if value == 0.0 else "diluting"
