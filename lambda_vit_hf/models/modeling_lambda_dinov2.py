"""LambdaDinov2: a DINOv2 whose attention layers can fade into the identity and be removed.

Everything that is not about removal is transformers' DINOv2. Shapes: `(batch, tokens, hidden)`.
"""

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutput, BaseModelOutputWithPooling
from transformers.models.dinov2.modeling_dinov2 import (
    Dinov2Attention,
    Dinov2Backbone,
    Dinov2Embeddings,
    Dinov2Encoder,
    Dinov2ForImageClassification,
    Dinov2Layer,
    Dinov2Model,
    Dinov2PreTrainedModel,
    eager_attention_forward,
)

from .blocks import BlockDescription, RemovableAttention
from .configuration_lambda_dinov2 import LambdaDinov2Config
from .image_size import use_interpolated_positions
from .inference import StackedAttention
from .loading import read_key_names_of
from .pretrained_model import LambdaPreTrainedModel


read_key_names_of("Dinov2Model", "LambdaDinov2Model", "LambdaDinov2Backbone")


class LambdaDinov2Layer(RemovableAttention, Dinov2Layer):
    """One block. Differences from `Dinov2Layer`: those of [`RemovableAttention`]."""

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


class LambdaDinov2PreTrainedModel(LambdaPreTrainedModel, Dinov2PreTrainedModel):
    """Weights, loading and removal, for every LambdaDinov2 model: see [`LambdaPreTrainedModel`]."""

    config: LambdaDinov2Config
    config_class = LambdaDinov2Config
    _layers = "encoder.layer"
    _no_split_modules = ["Dinov2Embeddings", "LambdaDinov2Layer"]
    _can_record_outputs = {"hidden_states": LambdaDinov2Layer, "attentions": [Dinov2Attention, StackedAttention]}
    _auto_classes = {
        "AutoBackbone": "LambdaDinov2Backbone",
        "AutoModel": "LambdaDinov2Model",
        "AutoModelForImageClassification": "LambdaDinov2ForImageClassification",
    }
    _head_reads = "class_token_and_patch_mean"
    _fit_image_size = staticmethod(use_interpolated_positions)


class LambdaDinov2Encoder(LambdaDinov2PreTrainedModel, Dinov2Encoder):
    """The blocks. Differences from `Dinov2Encoder`: its layers are [`LambdaDinov2Layer`]s."""

    _layers = "layer"

    def __init__(self, config: LambdaDinov2Config):
        Dinov2PreTrainedModel.__init__(self, config)
        self.layer = nn.ModuleList([LambdaDinov2Layer(config, index) for index in range(config.num_hidden_layers)])
        self.post_init()

    def forward(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs
    ) -> BaseModelOutput:
        """As `Dinov2Encoder.forward`."""
        return self._run_blocks(super().forward, hidden_states, attention_mask, **kwargs)


class LambdaDinov2Model(LambdaDinov2PreTrainedModel, Dinov2Model):
    """The bare LambdaDinov2. Differences from `Dinov2Model`: its encoder is a [`LambdaDinov2Encoder`]."""

    def __init__(self, config: LambdaDinov2Config):
        Dinov2PreTrainedModel.__init__(self, config)
        self.embeddings = Dinov2Embeddings(config)
        self.encoder = LambdaDinov2Encoder(config)
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
        """As `Dinov2Model.forward`; with token merging `attention_mask` must be `None` (ValueError)."""
        # Here the mask is the caller's: in a graph transformers makes one for the encoder where there is none.
        kwargs = self._with_token_flow(attention_mask, kwargs)
        return super().forward(pixel_values, bool_masked_pos, attention_mask, **kwargs)


class LambdaDinov2ForImageClassification(LambdaDinov2PreTrainedModel, Dinov2ForImageClassification):
    """LambdaDinov2 with a linear head on the class token and the mean of the patch tokens, `(batch, 2 * hidden)`."""

    def __init__(self, config: LambdaDinov2Config):
        Dinov2PreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.dinov2 = LambdaDinov2Model(config)
        self.classifier = (
            nn.Linear(config.hidden_size * 2, config.num_labels) if config.num_labels > 0 else nn.Identity()
        )
        self.post_init()


class LambdaDinov2Backbone(LambdaDinov2PreTrainedModel, Dinov2Backbone):
    """LambdaDinov2 as a backbone. A folded model gives the feature maps of the unfolded one, to the bit."""

    _can_merge_tokens = False  # it gives maps of all patches
    _final_norm = None  # it reads recorded states, which are as large as in an unfolded model

    def __init__(self, config: LambdaDinov2Config):
        Dinov2Backbone.__init__(self, config)
        self.encoder = LambdaDinov2Encoder(config)
        self.encoder._can_merge_tokens = False
        self._follow_config()
        self.post_init()


LambdaDinov2Backbone.register_for_auto_class("AutoBackbone")
LambdaDinov2Model.register_for_auto_class("AutoModel")
LambdaDinov2ForImageClassification.register_for_auto_class("AutoModelForImageClassification")

__all__ = [
    "LambdaDinov2Backbone",
    "LambdaDinov2ForImageClassification",
    "LambdaDinov2Model",
    "LambdaDinov2PreTrainedModel",
]
