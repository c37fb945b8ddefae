"""LambdaDINOv3ViT: a DINOv3 ViT whose attention layers can fade into the identity and be removed.

Everything that is not about removal is transformers' DINOv3 ViT; transformers 5.23 has no classifier for it, so it has
DINOv2's here. Shapes: `(batch, tokens, hidden)`.
"""

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutput, ImageClassifierOutput
from transformers.models.dinov3_vit.modeling_dinov3_vit import (
    DINOv3ViTAttention,
    DINOv3ViTBackbone,
    DINOv3ViTEmbeddings,
    DINOv3ViTEncoder,
    DINOv3ViTLayer,
    DINOv3ViTModel,
    DINOv3ViTPreTrainedModel,
    DINOv3ViTRopePositionEmbedding,
    apply_rotary_pos_emb,
    eager_attention_forward,
)
from transformers.utils.generic import can_return_tuple

from .blocks import BlockDescription, RemovableAttention
from .configuration_lambda_dinov3_vit import LambdaDINOv3ViTConfig
from .image_size import note_image_size
from .inference import StackedAttention
from .loading import read_key_names_of
from .pretrained_model import LambdaPreTrainedModel


read_key_names_of("dinov3_vit", "LambdaDINOv3ViTModel", "LambdaDINOv3ViTBackbone")


class LambdaDINOv3ViTLayer(RemovableAttention, DINOv3ViTLayer):
    """One block. Differences from `DINOv3ViTLayer`: those of [`RemovableAttention`]."""

    block = BlockDescription(
        attention_norm="norm1",
        attention="attention",
        attention_scale="layer_scale1",
        mlp_norm="norm2",
        mlp="mlp",
        mlp_scale="layer_scale2",
        attention_end="o_proj",
        mlp_ends=("down_proj",),
        drops=("drop_path",),
        eager_attention=eager_attention_forward,
        rotate=apply_rotary_pos_emb,
    )


class LambdaDINOv3ViTPreTrainedModel(LambdaPreTrainedModel, DINOv3ViTPreTrainedModel):
    """Weights, loading and removal, for every LambdaDINOv3ViT model: see [`LambdaPreTrainedModel`]."""

    config: LambdaDINOv3ViTConfig
    config_class = LambdaDINOv3ViTConfig
    base_model_prefix = "dinov3_vit"
    _layers, _final_norm = "model.layer", "norm"
    _no_split_modules = ["DINOv3ViTEmbeddings", "LambdaDINOv3ViTLayer"]
    _can_record_outputs = {
        "hidden_states": LambdaDINOv3ViTLayer,
        "attentions": [DINOv3ViTAttention, StackedAttention],
    }
    _auto_classes = {
        "AutoBackbone": "LambdaDINOv3ViTBackbone",
        "AutoModel": "LambdaDINOv3ViTModel",
        "AutoModelForImageClassification": "LambdaDINOv3ViTForImageClassification",
    }
    _can_merge_tokens = False  # a merged token has no place for rotary position embeddings
    _head_reads = "class_token_and_patch_mean"

    def embed(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, dict]:
        base = self.base_model
        return base.embeddings(pixel_values), {"position_embeddings": base.rope_embeddings(pixel_values)}

    _fit_image_size = staticmethod(note_image_size)


class LambdaDINOv3ViTEncoder(LambdaDINOv3ViTPreTrainedModel, DINOv3ViTEncoder):
    """The blocks. Differences from `DINOv3ViTEncoder`: its layers are [`LambdaDINOv3ViTLayer`]s."""

    _layers = "layer"

    def __init__(self, config: LambdaDINOv3ViTConfig):
        DINOv3ViTPreTrainedModel.__init__(self, config)
        self.layer = nn.ModuleList([LambdaDINOv3ViTLayer(config, index) for index in range(config.num_hidden_layers)])
        self.post_init()

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        **kwargs,
    ) -> BaseModelOutput:
        """As `DINOv3ViTEncoder.forward`."""
        return self._run_blocks(super().forward, hidden_states, position_embeddings=position_embeddings, **kwargs)


class LambdaDINOv3ViTModel(LambdaDINOv3ViTPreTrainedModel, DINOv3ViTModel):
    """The bare LambdaDINOv3ViT. Differences from `DINOv3ViTModel`: its encoder is a [`LambdaDINOv3ViTEncoder`]."""

    def __init__(self, config: LambdaDINOv3ViTConfig):
        DINOv3ViTPreTrainedModel.__init__(self, config)
        self.embeddings = DINOv3ViTEmbeddings(config)
        self.rope_embeddings = DINOv3ViTRopePositionEmbedding(config)
        self.model = LambdaDINOv3ViTEncoder(config)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self._follow_config()
        self.post_init()


class LambdaDINOv3ViTForImageClassification(LambdaDINOv3ViTPreTrainedModel):
    """LambdaDINOv3ViT with a linear head on the class token and the mean of the patch tokens, as DINOv2 has it."""

    def __init__(self, config: LambdaDINOv3ViTConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.dinov3_vit = LambdaDINOv3ViTModel(config)
        width = 2 * config.hidden_size
        self.classifier = nn.Linear(width, config.num_labels) if config.num_labels > 0 else nn.Identity()
        self.post_init()

    def get_input_embeddings(self):
        return self.dinov3_vit.embeddings.patch_embeddings

    @can_return_tuple
    def forward(
        self, pixel_values: torch.Tensor | None = None, labels: torch.Tensor | None = None, **kwargs
    ) -> ImageClassifierOutput:
        """
        Args:
            pixel_values (`torch.Tensor` of shape `(batch, channels, height, width)`): any size that patches fill.
            labels (`torch.Tensor` of shape `(batch,)`, *optional*): classes, for the loss.
        """
        outputs = self.dinov3_vit(pixel_values, **kwargs)
        logits = self.classifier(self.head_input(outputs.last_hidden_state))
        loss = None if labels is None else self.loss_function(labels, logits, self.config, **kwargs)
        return ImageClassifierOutput(loss, logits, outputs.hidden_states, outputs.attentions)


class LambdaDINOv3ViTBackbone(LambdaDINOv3ViTPreTrainedModel, DINOv3ViTBackbone):
    """LambdaDINOv3ViT as a backbone. A folded model gives the feature maps of the unfolded one, to the bit."""

    _final_norm = None  # it reads recorded states, which are as large as in an unfolded model

    def __init__(self, config: LambdaDINOv3ViTConfig):
        DINOv3ViTBackbone.__init__(self, config)
        self.model = LambdaDINOv3ViTEncoder(config)
        self._follow_config()
        self.post_init()


LambdaDINOv3ViTBackbone.register_for_auto_class("AutoBackbone")
LambdaDINOv3ViTModel.register_for_auto_class("AutoModel")
LambdaDINOv3ViTForImageClassification.register_for_auto_class("AutoModelForImageClassification")

__all__ = [
    "LambdaDINOv3ViTBackbone",
    "LambdaDINOv3ViTForImageClassification",
    "LambdaDINOv3ViTModel",
    "LambdaDINOv3ViTPreTrainedModel",
]
