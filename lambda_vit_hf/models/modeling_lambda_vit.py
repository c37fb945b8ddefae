"""LambdaViT: a ViT whose attention layers can fade into the identity and be removed.

Everything that is not about removal is transformers' ViT. Shapes: `(batch, tokens, hidden)`.
Source: Lin et al., "MLP Can Be A Good Transformer Learner", CVPR 2024 (arXiv 2404.05657), sections 3.3 and 3.4.
"""

import torch
from torch import nn
from transformers.backbone_utils import BackboneMixin, filter_output_hidden_states
from transformers.modeling_outputs import BackboneOutput, BaseModelOutputWithPooling
from transformers.models.vit.modeling_vit import (
    ViTEmbeddings,
    ViTForImageClassification,
    ViTForMaskedImageModeling,
    ViTModel,
    ViTPooler,
    ViTPreTrainedModel,
)
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .blocks import LambdaViTLayer
from .configuration_lambda_vit import LambdaViTConfig
from .folding import residual_scales
from .loading import read_vit_key_names
from .pretrained_model import AUTO_CLASSES, LambdaViTPreTrainedModel


read_vit_key_names("LambdaViTModel", "LambdaViTBackbone")


class LambdaViTModel(LambdaViTPreTrainedModel, ViTModel):
    """
    The bare LambdaViT.

    Differences from `ViTModel`: its layers are [`LambdaViTLayer`]s; with token merging, `last_hidden_state` and the
    later `hidden_states` have fewer tokens than the image has patches, class token first, the others in no order.
    """

    class_token_only = False

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
        merges_tokens = any(layer.merged_tokens for layer in self.layers)
        if merges_tokens and attention_mask is not None:
            raise ValueError("Token merging takes no `attention_mask`: merged tokens have no place in it. Pass None.")
        if merges_tokens and self.config._attn_implementation not in (None, "eager", "sdpa"):
            raise ValueError(
                "Token merging weighs keys by their sizes, which needs attention with an additive mask: use"
                f' attn_implementation="sdpa" or "eager", not {self.config._attn_implementation!r}.'
            )
        asked_for = ("output_hidden_states", "output_attentions")
        recorded = any(kwargs.get(name, getattr(self.config, name, False)) for name in asked_for)
        class_token_only = self.class_token_only and attention_mask is None and not recorded
        arguments = {"bool_masked_pos": bool_masked_pos, "interpolate_pos_encoding": interpolate_pos_encoding}
        if merges_tokens or class_token_only:
            return self._forward_fewer_tokens(pixel_values, class_token_only, **arguments, **kwargs)
        return super().forward(pixel_values, attention_mask=attention_mask, **arguments, **kwargs)

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def _forward_fewer_tokens(
        self, pixel_values, class_token_only, bool_masked_pos, interpolate_pos_encoding, **kwargs
    ) -> BaseModelOutputWithPooling:
        """`ViTModel.forward` where tokens get fewer on the way: their sizes pass from layer to layer."""
        pixel_values = pixel_values.to(self.embeddings.patch_embeddings.projection.weight.dtype)
        hidden_states = self.embeddings(pixel_values, bool_masked_pos, bool(interpolate_pos_encoding))
        token_sizes, last_attention = None, self.config.kept_layers[-1]
        for index, layer in enumerate(self.layers):
            hidden_states, token_sizes = layer(
                hidden_states, keep_sizes=True, token_sizes=token_sizes,
                class_token_only=class_token_only and index == last_attention, **kwargs,
            )  # fmt: skip
        hidden_states = self.layernorm(hidden_states)
        pooled = None if self.pooler is None else self.pooler(hidden_states)
        return BaseModelOutputWithPooling(last_hidden_state=hidden_states, pooler_output=pooled)


class LambdaViTForImageClassification(LambdaViTPreTrainedModel, ViTForImageClassification):
    """
    LambdaViT with a linear head on the class token.

    Example:

    ```python
    >>> from lambda_vit_hf import LambdaViTForImageClassification

    >>> model = LambdaViTForImageClassification.from_pretrained("facebook/deit-base-patch16-224")  # any ViT
    >>> model.set_attention_lambda(0.5, layers=[0, 1])  # half way into the identity
    >>> model.remove_attention([0, 1])
    >>> model.fold_removed_attention()
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
        self.vit = LambdaViTModel(config, add_pooling_layer=False, use_mask_token=True)
        self.vit._can_merge_tokens = False
        self.vit._follow_config()
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
    >>> from lambda_vit_hf import LambdaViTBackbone

    >>> backbone = LambdaViTBackbone.from_pretrained("facebook/deit-base-patch16-224", out_indices=[3, 6, 9, 12])
    >>> [tuple(feature_map.shape) for feature_map in backbone(pixel_values).feature_maps]
    [(1, 768, 14, 14), (1, 768, 14, 14), (1, 768, 14, 14), (1, 768, 14, 14)]
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
        maps = [self._feature_map(output.hidden_states[stage], stage, pixel_values.shape) for stage in stages]
        return BackboneOutput(tuple(maps), output.hidden_states, output.attentions)

    def _feature_map(self, hidden_states: torch.Tensor, stage: int, image_shape: torch.Size) -> torch.Tensor:
        # A folded stream is smaller by the doublings up to its stage, and so is the epsilon: the last LayerNorm's own
        # is right for the last stage only.
        scale, exponent = 1.0, self.config.fold_exponent
        if self.config.fold_removed:
            scale = [2.0**-exponent, *residual_scales(self.config.attention_flags, exponent)][stage]
        if self.config.apply_layernorm:
            norm, eps = self.layernorm, self.config.layer_norm_eps / scale**2
            hidden_states = nn.functional.layer_norm(hidden_states, norm.normalized_shape, norm.weight, norm.bias, eps)
        else:
            hidden_states = hidden_states * scale
        if not self.config.reshape_hidden_states:
            return hidden_states
        patch_height, patch_width = self.embeddings.patch_embeddings.patch_size
        grid = (image_shape[2] // patch_height, image_shape[3] // patch_width)
        return hidden_states[:, 1:].transpose(1, 2).unflatten(2, grid).contiguous()


# Saved models carry this file and those it imports, so that they load where the package is not installed.
for _auto_class, _class_name in AUTO_CLASSES.items():
    globals()[_class_name].register_for_auto_class(_auto_class)

__all__ = [
    "LambdaViTBackbone",
    "LambdaViTForImageClassification",
    "LambdaViTForMaskedImageModeling",
    "LambdaViTModel",
    "LambdaViTPreTrainedModel",
]
