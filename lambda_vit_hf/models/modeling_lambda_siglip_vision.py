"""LambdaSiglipVision: a SigLIP vision tower whose attention layers can fade into the identity and be removed.

Everything that is not about removal is transformers' SigLIP, which also reads SigLIP 2 of fixed resolution. Shapes:
`(batch, tokens, hidden)`; there is no class token.
"""

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPooling, ImageClassifierOutput
from transformers.models.siglip.modeling_siglip import (
    SiglipAttention,
    SiglipEncoder,
    SiglipEncoderLayer,
    SiglipPreTrainedModel,
    SiglipVisionModel,
    eager_attention_forward,
)
from transformers.utils.generic import can_return_tuple

from .blocks import BlockDescription, RemovableAttention
from .configuration_lambda_siglip_vision import LambdaSiglipVisionConfig
from .image_size import use_interpolated_position_table
from .inference import StackedAttention
from .loading import read_key_names_of
from .pretrained_model import LambdaPreTrainedModel


read_key_names_of("SiglipVisionModel", "LambdaSiglipVisionModel")


class LambdaSiglipVisionLayer(RemovableAttention, SiglipEncoderLayer):
    """One block. Differences from `SiglipEncoderLayer`: those of [`RemovableAttention`]."""

    block = BlockDescription(
        attention_norm="layer_norm1",
        attention="self_attn",
        mlp_norm="layer_norm2",
        mlp="mlp",
        attention_end="out_proj",
        mlp_ends=("fc2",),
        eager_attention=eager_attention_forward,
    )


class LambdaSiglipVisionPreTrainedModel(LambdaPreTrainedModel, SiglipPreTrainedModel):
    """Weights, loading and removal, for every LambdaSiglipVision model: see [`LambdaPreTrainedModel`]."""

    config: LambdaSiglipVisionConfig
    config_class = LambdaSiglipVisionConfig
    base_model_prefix = "vision_model"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    _layers, _final_norm = "encoder.layers", "post_layernorm"
    # The pooling head belongs to the encoder's features; the text tower beside it does not.
    _head_keys = r"^(classifier|text_model|logit_scale|logit_bias)(\.|$)|(^|\.)position_ids$"
    _no_split_modules = ["SiglipVisionEmbeddings", "LambdaSiglipVisionLayer", "SiglipMultiheadAttentionPoolingHead"]
    _can_record_outputs = {"hidden_states": LambdaSiglipVisionLayer, "attentions": [SiglipAttention, StackedAttention]}
    _auto_classes = {
        "AutoModel": "LambdaSiglipVisionModel",
        "AutoModelForImageClassification": "LambdaSiglipVisionForImageClassification",
    }
    _head_reads, _num_special_tokens = "patch_mean", 0

    def pool(self, tokens: torch.Tensor) -> torch.Tensor:
        """The answer of the attention-pooling head, where there is one: SigLIP has no class token."""
        return self.base_model.head(tokens) if self.base_model.use_head else tokens.mean(dim=1)

    def get_input_embeddings(self):
        return self.base_model.embeddings.patch_embedding

    _fit_image_size = staticmethod(use_interpolated_position_table)


class LambdaSiglipVisionEncoder(SiglipEncoder):
    """The blocks. Differences from `SiglipEncoder`: its layers are [`LambdaSiglipVisionLayer`]s."""

    def __init__(self, config: LambdaSiglipVisionConfig):
        nn.Module.__init__(self)
        self.config, self.gradient_checkpointing = config, False
        layers = [LambdaSiglipVisionLayer(config, index) for index in range(config.num_hidden_layers)]
        self.layers = nn.ModuleList(layers)


class LambdaSiglipVisionModel(LambdaSiglipVisionPreTrainedModel, SiglipVisionModel):
    """The bare tower. Differences from `SiglipVisionModel`: its encoder is a [`LambdaSiglipVisionEncoder`]."""

    def __init__(self, config: LambdaSiglipVisionConfig):
        SiglipVisionModel.__init__(self, config)
        self.encoder = LambdaSiglipVisionEncoder(config)
        self._follow_config()
        self.post_init()

    def forward(
        self, pixel_values: torch.Tensor, interpolate_pos_encoding: bool | None = False, **kwargs
    ) -> BaseModelOutputWithPooling:
        """As `SiglipVisionModel.forward`."""
        return self._run_blocks(
            super().forward, pixel_values, interpolate_pos_encoding=interpolate_pos_encoding, **kwargs
        )


class LambdaSiglipVisionForImageClassification(LambdaSiglipVisionPreTrainedModel):
    """The tower with a linear head on the mean of its tokens, as `SiglipForImageClassification`."""

    def __init__(self, config: LambdaSiglipVisionConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.vision_model = LambdaSiglipVisionModel(config)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels) if config.num_labels > 0 else nn.Identity()
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        **kwargs,
    ) -> ImageClassifierOutput:
        """
        Args:
            pixel_values (`torch.Tensor` of shape `(batch, channels, height, width)`): images.
            labels (`torch.Tensor` of shape `(batch,)`, *optional*): classes, for the loss.
            interpolate_pos_encoding (`bool`, *optional*, defaults to `False`): take images of another size.
        """
        outputs = self.vision_model(pixel_values, interpolate_pos_encoding=interpolate_pos_encoding, **kwargs)
        logits = self.classifier(self.head_input(outputs.last_hidden_state))
        loss = None if labels is None else self.loss_function(labels, logits, self.config, **kwargs)
        return ImageClassifierOutput(loss, logits, outputs.hidden_states, outputs.attentions)


LambdaSiglipVisionModel.register_for_auto_class("AutoModel")
LambdaSiglipVisionForImageClassification.register_for_auto_class("AutoModelForImageClassification")

__all__ = [
    "LambdaSiglipVisionForImageClassification",
    "LambdaSiglipVisionModel",
    "LambdaSiglipVisionPreTrainedModel",
]
