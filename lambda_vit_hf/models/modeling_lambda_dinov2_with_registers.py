"""LambdaDinov2WithRegisters: a DINOv2 with registers whose attention layers can fade into the identity and be removed.

Everything that is not about removal is transformers' DINOv2 with registers. Shapes: `(batch, tokens, hidden)`.
"""

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutput, BaseModelOutputWithPooling
from transformers.models.dinov2_with_registers.modeling_dinov2_with_registers import (
    Dinov2WithRegistersAttention,
    Dinov2WithRegistersBackbone,
    Dinov2WithRegistersEmbeddings,
    Dinov2WithRegistersEncoder,
    Dinov2WithRegistersForImageClassification,
    Dinov2WithRegistersLayer,
    Dinov2WithRegistersModel,
    Dinov2WithRegistersPreTrainedModel,
    eager_attention_forward,
)

from .blocks import BlockDescription, RemovableAttention
from .configuration_lambda_dinov2_with_registers import LambdaDinov2WithRegistersConfig
from .image_size import use_interpolated_positions
from .inference import StackedAttention
from .loading import read_key_names_of
from .pretrained_model import LambdaPreTrainedModel


read_key_names_of("Dinov2WithRegistersModel", "LambdaDinov2WithRegistersModel", "LambdaDinov2WithRegistersBackbone")


class LambdaDinov2WithRegistersLayer(RemovableAttention, Dinov2WithRegistersLayer):
    """One block. Differences from `Dinov2WithRegistersLayer`: those of [`RemovableAttention`]."""

    block = BlockDescription(
        attention_norm="norm1",
        attention="attention",
        attention_scale="layer_scale1",
        mlp_norm="norm2",
        mlp="mlp",
        mlp_scale="layer_scale2",
        attention_end="o_proj",
        mlp_ends=("fc2", "down_proj"),
        drops=("drop_path",),
        eager_attention=eager_attention_forward,
    )


class LambdaDinov2WithRegistersPreTrainedModel(LambdaPreTrainedModel, Dinov2WithRegistersPreTrainedModel):
    """Weights, loading and removal, for every LambdaDinov2WithRegisters model: see [`LambdaPreTrainedModel`]."""

    config: LambdaDinov2WithRegistersConfig
    config_class = LambdaDinov2WithRegistersConfig
    _layers = "encoder.layer"
    _no_split_modules = ["Dinov2WithRegistersEmbeddings", "LambdaDinov2WithRegistersLayer"]
    _can_record_outputs = {
        "hidden_states": LambdaDinov2WithRegistersLayer,
        "attentions": [Dinov2WithRegistersAttention, StackedAttention],
    }
    _auto_classes = {
        "AutoBackbone": "LambdaDinov2WithRegistersBackbone",
        "AutoModel": "LambdaDinov2WithRegistersModel",
        "AutoModelForImageClassification": "LambdaDinov2WithRegistersForImageClassification",
    }
    _head_reads = "class_token_and_patch_mean"
    _fit_image_size = staticmethod(use_interpolated_positions)


class LambdaDinov2WithRegistersEncoder(LambdaDinov2WithRegistersPreTrainedModel, Dinov2WithRegistersEncoder):
    """The blocks. Differences from `Dinov2WithRegistersEncoder`: its layers."""

    _layers = "layer"

    def __init__(self, config: LambdaDinov2WithRegistersConfig):
        Dinov2WithRegistersPreTrainedModel.__init__(self, config)
        self.layer = nn.ModuleList(
            [LambdaDinov2WithRegistersLayer(config, index) for index in range(config.num_hidden_layers)]
        )
        self.post_init()

    def forward(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs
    ) -> BaseModelOutput:
        """As `Dinov2WithRegistersEncoder.forward`."""
        return self._run_blocks(super().forward, hidden_states, attention_mask, **kwargs)


class LambdaDinov2WithRegistersModel(LambdaDinov2WithRegistersPreTrainedModel, Dinov2WithRegistersModel):
    """The bare LambdaDinov2WithRegisters. Differences from `Dinov2WithRegistersModel`: its encoder."""

    def __init__(self, config: LambdaDinov2WithRegistersConfig):
        Dinov2WithRegistersPreTrainedModel.__init__(self, config)
        self.embeddings = Dinov2WithRegistersEmbeddings(config)
        self.encoder = LambdaDinov2WithRegistersEncoder(config)
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self._follow_config()
        self.post_init()

    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        bool_masked_pos: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPooling:
        """As `Dinov2WithRegistersModel.forward`; with token merging `attention_mask` must be `None` (ValueError)."""
        # Here the mask is the caller's: in a graph transformers makes one for the encoder where there is none.
        kwargs = self._with_token_flow(attention_mask, kwargs)
        return super().forward(pixel_values, bool_masked_pos, attention_mask, **kwargs)


class LambdaDinov2WithRegistersForImageClassification(
    LambdaDinov2WithRegistersPreTrainedModel, Dinov2WithRegistersForImageClassification
):
    """With a linear head on the class token and the mean of the patch tokens, `(batch, 2 * hidden)`."""

    def __init__(self, config: LambdaDinov2WithRegistersConfig):
        Dinov2WithRegistersPreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.dinov2_with_registers = LambdaDinov2WithRegistersModel(config)
        self.classifier = (
            nn.Linear(config.hidden_size * 2, config.num_labels) if config.num_labels > 0 else nn.Identity()
        )
        self.post_init()


class LambdaDinov2WithRegistersBackbone(LambdaDinov2WithRegistersPreTrainedModel, Dinov2WithRegistersBackbone):
    """A backbone. A folded model gives the feature maps of the unfolded one, to the bit."""

    _can_merge_tokens = False  # it gives maps of all patches
    _final_norm = None  # it reads recorded states, which are as large as in an unfolded model

    def __init__(self, config: LambdaDinov2WithRegistersConfig):
        Dinov2WithRegistersBackbone.__init__(self, config)
        self.encoder = LambdaDinov2WithRegistersEncoder(config)
        self.encoder._can_merge_tokens = False
        self._follow_config()
        self.post_init()


LambdaDinov2WithRegistersBackbone.register_for_auto_class("AutoBackbone")
LambdaDinov2WithRegistersModel.register_for_auto_class("AutoModel")
LambdaDinov2WithRegistersForImageClassification.register_for_auto_class("AutoModelForImageClassification")

__all__ = [
    "LambdaDinov2WithRegistersBackbone",
    "LambdaDinov2WithRegistersForImageClassification",
    "LambdaDinov2WithRegistersModel",
    "LambdaDinov2WithRegistersPreTrainedModel",
]
