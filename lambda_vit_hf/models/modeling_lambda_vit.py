"""LambdaViT: a ViT whose attention layers can fade into the identity and be removed.

Everything that is not about removal is transformers' ViT. Shapes: `(batch, tokens, hidden)`.
Source: Lin et al., "MLP Can Be A Good Transformer Learner", CVPR 2024 (arXiv 2404.05657), sections 3.3 and 3.4.
"""

import torch
from torch import nn
from transformers.backbone_utils import BackboneMixin, filter_output_hidden_states
from transformers.modeling_outputs import BackboneOutput, BaseModelOutputWithPooling
from transformers.models.vit.modeling_vit import (
    ViTAttention,
    ViTEmbeddings,
    ViTForImageClassification,
    ViTForMaskedImageModeling,
    ViTLayer,
    ViTModel,
    ViTPooler,
    ViTPreTrainedModel,
    eager_attention_forward,
)
from transformers.utils.generic import can_return_tuple

from .blocks import BlockDescription, RemovableAttention
from .configuration_lambda_vit import LambdaViTConfig
from .inference import StackedAttention
from .loading import read_key_names_of
from .pretrained_model import LambdaPreTrainedModel


read_key_names_of("ViTModel", "LambdaViTModel", "LambdaViTBackbone")


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


class LambdaViTLayer(RemovableAttention, ViTLayer):
    """One block. Differences from `ViTLayer`: those of [`RemovableAttention`]; stochastic depth on both branches."""

    block = BlockDescription(
        attention_norm="layernorm_before",
        attention="attention",
        mlp_norm="layernorm_after",
        mlp="mlp",
        attention_end="o_proj",
        mlp_ends=("fc2",),
        drops=("dropout", "drop_path"),
        eager_attention=eager_attention_forward,
    )

    def __init__(self, config: LambdaViTConfig, layer_index: int):
        super().__init__(config, layer_index)
        self.drop_path = LambdaViTDropPath(config.drop_path_rates()[layer_index])


class LambdaViTPreTrainedModel(LambdaPreTrainedModel, ViTPreTrainedModel):
    """Weights, loading and removal, for every LambdaViT model: see [`LambdaPreTrainedModel`]."""

    config: LambdaViTConfig
    config_class = LambdaViTConfig
    _no_split_modules = ["ViTEmbeddings", "LambdaViTLayer"]
    _can_record_outputs = {"hidden_states": LambdaViTLayer, "attentions": [ViTAttention, StackedAttention]}
    _auto_classes = {
        "AutoBackbone": "LambdaViTBackbone",
        "AutoModel": "LambdaViTModel",
        "AutoModelForImageClassification": "LambdaViTForImageClassification",
        "AutoModelForMaskedImageModeling": "LambdaViTForMaskedImageModeling",
    }


class LambdaViTModel(LambdaViTPreTrainedModel, ViTModel):
    """
    The bare LambdaViT.

    Differences from `ViTModel`: its layers are [`LambdaViTLayer`]s; with token merging, `last_hidden_state` and the
    later `hidden_states` have fewer tokens than the image has patches, class token first, the others in no order.
    """

    def __init__(self, config: LambdaViTConfig, add_pooling_layer: bool = True, use_mask_token: bool = False):
        ViTPreTrainedModel.__init__(self, config)
        self.embeddings = ViTEmbeddings(config, use_mask_token=use_mask_token)
        self.layers = nn.ModuleList([LambdaViTLayer(config, index) for index in range(config.num_hidden_layers)])
        self.layernorm = nn.LayerNorm(config.hidden_size)
        self.pooler = ViTPooler(config) if add_pooling_layer else None
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
        """As `ViTModel.forward`; with token merging `attention_mask` must be `None` (ValueError)."""
        return self._run_blocks(
            super().forward, pixel_values, attention_mask, bool_masked_pos=bool_masked_pos,
            interpolate_pos_encoding=interpolate_pos_encoding, **kwargs,
        )  # fmt: skip


class LambdaViTForImageClassification(LambdaViTPreTrainedModel, ViTForImageClassification):
    """
    LambdaViT with a linear head on the class token.

    Example:

    ```python
    from lambda_vit_hf import LambdaViTForImageClassification

    model = LambdaViTForImageClassification.from_pretrained("facebook/deit-base-patch16-224")  # any ViT
    model.set_attention_lambda(0.5, layers=[0, 1])  # half way into the identity
    model.remove_attention([0, 1])
    model.fold_removed_attention()
    ```
    """

    def __init__(self, config: LambdaViTConfig):
        ViTPreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.vit = LambdaViTModel(config, add_pooling_layer=False)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels) if config.num_labels > 0 else nn.Identity()
        self.post_init()


class LambdaViTForMaskedImageModeling(LambdaViTPreTrainedModel, ViTForMaskedImageModeling):
    """LambdaViT with a decoder for masked image modeling, as [`ViTForMaskedImageModeling`]. It merges no tokens."""

    _can_merge_tokens = False

    def __init__(self, config: LambdaViTConfig):
        ViTPreTrainedModel.__init__(self, config)
        self._check_merging_is_possible()
        self.vit = LambdaViTModel(config, add_pooling_layer=False, use_mask_token=True)
        self.vit._can_merge_tokens = False
        self.decoder = nn.Sequential(
            nn.Conv2d(config.hidden_size, config.encoder_stride**2 * config.num_channels, kernel_size=1),
            nn.PixelShuffle(config.encoder_stride),
        )
        self.post_init()


class LambdaViTBackbone(BackboneMixin, LambdaViTModel):
    """
    LambdaViT as a backbone: feature maps of the stages that `config.out_features` names, for detectors and the like.

    Differences from `LambdaViTModel`: no pooler, no token merging; returns a `BackboneOutput`. A folded model gives
    the feature maps of the unfolded one, to the bit.

    Example:

    ```python
    from lambda_vit_hf import LambdaViTBackbone

    backbone = LambdaViTBackbone.from_pretrained("facebook/deit-base-patch16-224", out_indices=[3, 6, 9, 12])
    [tuple(feature_map.shape) for feature_map in backbone(pixel_values).feature_maps]  # four times (1, 768, 14, 14)
    ```
    """

    _can_merge_tokens = False

    def __init__(self, config: LambdaViTConfig):
        super().__init__(config, add_pooling_layer=False)
        self.num_features = [config.hidden_size] * len(config.stage_names)

    @can_return_tuple
    @filter_output_hidden_states
    def forward(self, pixel_values: torch.Tensor, **kwargs) -> BackboneOutput:
        """Takes `pixel_values` `(batch, channels, height, width)`, and what [`LambdaViTModel`] takes besides."""
        output = LambdaViTModel.forward(self, pixel_values, **kwargs)
        stages = [self.stage_names.index(name) for name in self.out_features]
        maps = [self._feature_map(output.hidden_states[stage], pixel_values.shape) for stage in stages]
        return BackboneOutput(tuple(maps), output.hidden_states, output.attentions)

    def _feature_map(self, hidden_states: torch.Tensor, image_shape: torch.Size) -> torch.Tensor:
        if self.config.apply_layernorm:
            # Recorded states are as large as in an unfolded model: the config's own epsilon fits them.
            norm, eps = self.layernorm, self.config.layer_norm_eps
            hidden_states = nn.functional.layer_norm(hidden_states, norm.normalized_shape, norm.weight, norm.bias, eps)
        if not self.config.reshape_hidden_states:
            return hidden_states
        patch_height, patch_width = self.embeddings.patch_embeddings.patch_size
        grid = (image_shape[2] // patch_height, image_shape[3] // patch_width)
        return hidden_states[:, 1:].transpose(1, 2).unflatten(2, grid).contiguous()


# Saved models carry this file and those it imports, so that they load where the package is not installed.
LambdaViTBackbone.register_for_auto_class("AutoBackbone")
LambdaViTModel.register_for_auto_class("AutoModel")
LambdaViTForImageClassification.register_for_auto_class("AutoModelForImageClassification")
LambdaViTForMaskedImageModeling.register_for_auto_class("AutoModelForMaskedImageModeling")

__all__ = [
    "LambdaViTBackbone",
    "LambdaViTForImageClassification",
    "LambdaViTForMaskedImageModeling",
    "LambdaViTModel",
    "LambdaViTPreTrainedModel",
]
