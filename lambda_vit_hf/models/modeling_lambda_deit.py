"""LambdaDeiT: a DeiT with distillation token whose attention layers can fade into the identity and be removed.

Everything that is not about removal is transformers' DeiT. Shapes: `(batch, tokens, hidden)`.
"""

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.deit.modeling_deit import (
    DeiTAttention,
    DeiTEmbeddings,
    DeiTForImageClassification,
    DeiTForImageClassificationWithTeacher,
    DeiTLayer,
    DeiTModel,
    DeiTPooler,
    DeiTPreTrainedModel,
    eager_attention_forward,
)

from .blocks import BlockDescription, RemovableAttention
from .configuration_lambda_deit import LambdaDeiTConfig
from .inference import StackedAttention
from .loading import read_key_names_of
from .pretrained_model import LambdaPreTrainedModel


read_key_names_of("DeiTModel", "LambdaDeiTModel")


class LambdaDeiTLayer(RemovableAttention, DeiTLayer):
    """One block. Differences from `DeiTLayer`: those of [`RemovableAttention`]."""

    block = BlockDescription(
        attention_norm="layernorm_before",
        attention="attention",
        mlp_norm="layernorm_after",
        mlp="mlp",
        attention_end="o_proj",
        mlp_ends=("fc2",),
        drops=("dropout",),
        eager_attention=eager_attention_forward,
    )


class LambdaDeiTPreTrainedModel(LambdaPreTrainedModel, DeiTPreTrainedModel):
    """Weights, loading and removal, for every LambdaDeiT model: see [`LambdaPreTrainedModel`]."""

    config: LambdaDeiTConfig
    config_class = LambdaDeiTConfig
    _no_split_modules = ["DeiTEmbeddings", "LambdaDeiTLayer"]
    _can_record_outputs = {"hidden_states": LambdaDeiTLayer, "attentions": [DeiTAttention, StackedAttention]}
    _auto_classes = {
        "AutoModel": "LambdaDeiTModel",
        "AutoModelForImageClassification": "LambdaDeiTForImageClassification",
    }
    _num_special_tokens = 2


class LambdaDeiTModel(LambdaDeiTPreTrainedModel, DeiTModel):
    """
    The bare LambdaDeiT.

    Differences from `DeiTModel`: its layers are [`LambdaDeiTLayer`]s; with token merging, `last_hidden_state` and the
    later `hidden_states` have fewer tokens than the image has patches, class and distillation token first, the others
    in no order.
    """

    def __init__(self, config: LambdaDeiTConfig, add_pooling_layer: bool = True, use_mask_token: bool = False):
        DeiTPreTrainedModel.__init__(self, config)
        self.embeddings = DeiTEmbeddings(config, use_mask_token=use_mask_token)
        self.layers = nn.ModuleList([LambdaDeiTLayer(config, index) for index in range(config.num_hidden_layers)])
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.pooler = DeiTPooler(config) if add_pooling_layer else None
        self._follow_config()
        self.post_init()

    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        bool_masked_pos: torch.BoolTensor | None = None,
        interpolate_pos_encoding: bool | None = None,
        attention_mask: torch.Tensor | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPooling:
        """As `DeiTModel.forward`; with token merging `attention_mask` must be `None` (ValueError)."""
        return self._run_blocks(
            super().forward, pixel_values, attention_mask, bool_masked_pos=bool_masked_pos,
            interpolate_pos_encoding=interpolate_pos_encoding, **kwargs,
        )  # fmt: skip


class LambdaDeiTForImageClassification(LambdaDeiTPreTrainedModel, DeiTForImageClassification):
    """LambdaDeiT with a linear head on the class token, to fine-tune."""

    def __init__(self, config: LambdaDeiTConfig):
        DeiTPreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.deit = LambdaDeiTModel(config, add_pooling_layer=False)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels) if config.num_labels > 0 else nn.Identity()
        self.post_init()


class LambdaDeiTForImageClassificationWithTeacher(LambdaDeiTPreTrainedModel, DeiTForImageClassificationWithTeacher):
    """LambdaDeiT with a linear head on the class token and one on the distillation token; logits are their mean."""

    _auto_classes = {
        "AutoModel": "LambdaDeiTModel",
        "AutoModelForImageClassification": "LambdaDeiTForImageClassificationWithTeacher",
    }
    _head_reads = "class_and_distillation_token"

    def __init__(self, config: LambdaDeiTConfig):
        DeiTPreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.deit = LambdaDeiTModel(config, add_pooling_layer=False)
        for name in ("cls_classifier", "distillation_classifier"):
            head = nn.Linear(config.hidden_size, config.num_labels) if config.num_labels > 0 else nn.Identity()
            self.add_module(name, head)
        self.post_init()

    def head_input(self, tokens: torch.Tensor) -> torch.Tensor:
        return tokens[:, :2]

    def classify(self, features: torch.Tensor) -> torch.Tensor:
        return (self.cls_classifier(features[:, 0]) + self.distillation_classifier(features[:, 1])) / 2


LambdaDeiTModel.register_for_auto_class("AutoModel")
LambdaDeiTForImageClassification.register_for_auto_class("AutoModelForImageClassification")
LambdaDeiTForImageClassificationWithTeacher.register_for_auto_class("AutoModelForImageClassification")

__all__ = [
    "LambdaDeiTForImageClassification",
    "LambdaDeiTForImageClassificationWithTeacher",
    "LambdaDeiTModel",
    "LambdaDeiTPreTrainedModel",
]
