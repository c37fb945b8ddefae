"""LambdaCLIPVision: a CLIP vision tower whose attention layers can fade into the identity and be removed.

Everything that is not about removal is transformers' CLIP. Shapes: `(batch, tokens, hidden)`. CLIP differs from the
other families at both ends: a LayerNorm stands before the blocks, and `last_hidden_state` is the stream without one.
"""

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPooling, ImageClassifierOutput
from transformers.models.clip.modeling_clip import (
    CLIPAttention,
    CLIPEncoder,
    CLIPEncoderLayer,
    CLIPPreTrainedModel,
    CLIPVisionModel,
    eager_attention_forward,
)
from transformers.utils.generic import can_return_tuple

from .blocks import BlockDescription, RemovableAttention
from .configuration_lambda_clip_vision import LambdaCLIPVisionConfig
from .image_size import use_interpolated_position_table
from .inference import StackedAttention
from .loading import read_key_names_of
from .pretrained_model import LambdaPreTrainedModel


read_key_names_of("CLIPVisionModel", "LambdaCLIPVisionModel")


class LambdaCLIPVisionLayer(RemovableAttention, CLIPEncoderLayer):
    """One block. Differences from `CLIPEncoderLayer`: those of [`RemovableAttention`]."""

    block = BlockDescription(
        attention_norm="layer_norm1",
        attention="self_attn",
        mlp_norm="layer_norm2",
        mlp="mlp",
        attention_end="out_proj",
        mlp_ends=("fc2",),
        eager_attention=eager_attention_forward,
    )


class LambdaCLIPVisionPreTrainedModel(LambdaPreTrainedModel, CLIPPreTrainedModel):
    """Weights, loading and removal, for every LambdaCLIPVision model: see [`LambdaPreTrainedModel`]."""

    config: LambdaCLIPVisionConfig
    config_class = LambdaCLIPVisionConfig
    base_model_prefix = "vision_model"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    _layers, _final_norm, _stream_entry = "encoder.layers", "post_layernorm", "pre_layrnorm"
    _head_keys = r"^(classifier|text_model|text_projection|visual_projection|logit_scale)(\.|$)|(^|\.)position_ids$"
    _no_split_modules = ["CLIPVisionEmbeddings", "LambdaCLIPVisionLayer"]
    _can_record_outputs = {"hidden_states": LambdaCLIPVisionLayer, "attentions": [CLIPAttention, StackedAttention]}
    _auto_classes = {
        "AutoModel": "LambdaCLIPVisionModel",
        "AutoModelForImageClassification": "LambdaCLIPVisionForImageClassification",
    }
    _head_reads, _head_reads_norm = "patch_mean", False

    def embed(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, dict]:
        return self.base_model.pre_layrnorm(self.base_model.embeddings(pixel_values)), {}

    def get_input_embeddings(self):
        return self.base_model.embeddings.patch_embedding

    _fit_image_size = staticmethod(use_interpolated_position_table)


class LambdaCLIPVisionEncoder(CLIPEncoder):
    """The blocks. Differences from `CLIPEncoder`: its layers are [`LambdaCLIPVisionLayer`]s."""

    def __init__(self, config: LambdaCLIPVisionConfig):
        nn.Module.__init__(self)
        self.config, self.gradient_checkpointing = config, False
        self.layers = nn.ModuleList(
            [LambdaCLIPVisionLayer(config, index) for index in range(config.num_hidden_layers)]
        )


class LambdaCLIPVisionModel(LambdaCLIPVisionPreTrainedModel, CLIPVisionModel):
    """The bare tower. Differences from `CLIPVisionModel`: its encoder is a [`LambdaCLIPVisionEncoder`]."""

    def __init__(self, config: LambdaCLIPVisionConfig):
        CLIPVisionModel.__init__(self, config)
        self.encoder = LambdaCLIPVisionEncoder(config)
        self._follow_config()
        self.post_init()

    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        interpolate_pos_encoding: bool | None = False,
        stored_scale: bool = False,
        **kwargs,
    ) -> BaseModelOutputWithPooling:
        """As `CLIPVisionModel.forward`. With `stored_scale` a folded model's `last_hidden_state` stays smaller."""
        return_dict = kwargs.pop("return_dict", self.config.return_dict)
        outputs = self._run_blocks(
            super().forward,
            pixel_values,
            interpolate_pos_encoding=interpolate_pos_encoding,
            return_dict=True,
            **kwargs,
        )
        if not stored_scale and self.config.fold_removed:
            outputs["last_hidden_state"] = outputs.last_hidden_state * self.stream_scales()[-1]
        return outputs if return_dict else outputs.to_tuple()


class LambdaCLIPVisionForImageClassification(LambdaCLIPVisionPreTrainedModel):
    """The tower with a linear head on the mean of its patch tokens, as `CLIPForImageClassification`."""

    def __init__(self, config: LambdaCLIPVisionConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.vision_model = LambdaCLIPVisionModel(config)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels) if config.num_labels > 0 else nn.Identity()
        self.post_init()

    @can_return_tuple
    def forward(
        self, pixel_values: torch.Tensor | None = None, labels: torch.Tensor | None = None, **kwargs
    ) -> ImageClassifierOutput:
        """
        Args:
            pixel_values (`torch.Tensor` of shape `(batch, channels, height, width)`): images.
            labels (`torch.Tensor` of shape `(batch,)`, *optional*): classes, for the loss.
        """
        outputs = self.vision_model(pixel_values, stored_scale=True, **kwargs)
        logits = self.classify(self.head_input(outputs.last_hidden_state))
        loss = None if labels is None else self.loss_function(labels, logits, self.config, **kwargs)
        return ImageClassifierOutput(loss, logits, outputs.hidden_states, outputs.attentions)

    def classify(self, features: torch.Tensor) -> torch.Tensor:
        """Logits `(batch, classes)` of features as the stream is stored: no norm evens out that it is smaller."""
        scale = self.stream_scales()[-1]
        if scale == 1.0 or not isinstance(self.classifier, nn.Linear):
            return self.classifier(features * scale)
        # The weight and not the features takes the factor: in float16 they might leave the range.
        return nn.functional.linear(features, self.classifier.weight * scale, self.classifier.bias)


LambdaCLIPVisionModel.register_for_auto_class("AutoModel")
LambdaCLIPVisionForImageClassification.register_for_auto_class("AutoModelForImageClassification")

__all__ = [
    "LambdaCLIPVisionForImageClassification",
    "LambdaCLIPVisionModel",
    "LambdaCLIPVisionPreTrainedModel",
]
