"""LambdaViT: a ViT whose attention layers can fade into the identity and be removed.

Everything that is not about removal is transformers' ViT. Shapes: `(batch, tokens, hidden)`.
Source: Lin et al., "MLP Can Be A Good Transformer Learner", CVPR 2024 (arXiv 2404.05657), sections 3.3 and 3.4.
"""

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import initialization as init
from transformers.backbone_utils import BackboneMixin, filter_output_hidden_states
from transformers.modeling_outputs import BackboneOutput
from transformers.models.vit.modeling_vit import (
    ViTEmbeddings,
    ViTForImageClassification,
    ViTForMaskedImageModeling,
    ViTModel,
    ViTPooler,
    ViTPreTrainedModel,
)
from transformers.utils.generic import can_return_tuple

from .blocks import LambdaViTLayer, read_attention_state
from .configuration_lambda_vit import LambdaViTConfig
from .loading import (
    WANTED_REMOVAL,
    check_finished,
    check_loaded_weights,
    read_stored_config,
    read_vit_key_names,
    removal_to_do,
    set_image_size,
)
from .removal import check_layer_indices, fold_encoder_, folded_layer_norm_eps, residual_scales


read_vit_key_names("LambdaViTModel", "LambdaViTBackbone")


class LambdaViTPreTrainedModel(ViTPreTrainedModel):
    """
    Weights, loading and removal, for every LambdaViT model.

    Differences from `ViTPreTrainedModel`: `set_attention_lambda`, `remove_attention`, `fold_removed_attention`;
    `from_pretrained` takes any ViT checkpoint and raises where a weight of the encoder would stay random or be lost;
    `save_pretrained` writes the names the modules have, which is what `Trainer` needs to resume.
    """

    config: LambdaViTConfig
    config_class = LambdaViTConfig
    _no_split_modules = ["ViTEmbeddings", "LambdaViTLayer"]
    _keys_to_ignore_on_load_missing = [r"attention_lambda$"]

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, LambdaViTLayer) and module.attention is not None:
            init.ones_(module.attention_lambda)

    @property
    def encoder_layers(self) -> nn.ModuleList:
        """The blocks, index 0 nearest to the image."""
        return self.base_model.layers

    @property
    def attention_lambdas(self) -> list[float | None]:
        """Lambda of each layer; `None` where attention is removed."""
        return [None if layer.attention is None else layer.attention_lambda.item() for layer in self.encoder_layers]

    def set_attention_lambda(self, value: float, layers: list[int]) -> None:
        """
        Set the dilution coefficient of some layers.

        Args:
            value (`float`): lambda in [0, 1]; 1 is ordinary attention, at 0 the layer's attention is not computed.
            layers (`list[int]`): 0-based layer indices that still have attention.

        Raises:
            ValueError: if `value` is outside [0, 1], or a layer is unknown, repeated or already removed.
        """
        if isinstance(value, bool) or not 0.0 <= value <= 1.0:
            raise ValueError(f"lambda must be a number in [0, 1], got {value!r}.")
        for index in self._check_attention_exists(layers):
            self.encoder_layers[index].set_attention_lambda(value)

    def remove_attention(self, layers: list[int]) -> None:
        """
        Drop the attention weights and the first LayerNorm of some layers, whatever their lambda, and record it in the
        config. At lambda = 0 the model stays the same function, to the bit. In a folded model
        (`config.fold_removed`) the newly removed layers are folded too.

        Call it on the unwrapped model, after training: an optimizer keeps the parameters it was given.

        Args:
            layers (`list[int]`): 0-based layer indices that still have attention.

        Raises:
            ValueError: if a layer is unknown, repeated or already removed, or if no attention would be left. The
                model is unchanged then.
        """
        layers = self._check_attention_exists(layers)
        flags = [flag and index not in layers for index, flag in enumerate(self.config.attention_flags)]
        if not any(flags):
            raise ValueError(f"Removing {layers} would leave no attention at all. Keep at least one layer.")
        if self.config.fold_removed:
            fold_encoder_(self.encoder_layers, [index in layers for index in range(len(flags))])
        for index in layers:
            layer = self.encoder_layers[index]
            layer.attention = layer.layernorm_before = layer.attention_lambda = None
        self.config.attention_flags = flags
        self._follow_config()

    def fold_removed_attention(self) -> None:
        """
        Absorb the doubling of removed layers in the weights that follow; the function stays the same, to the bit in
        float32, bfloat16 and float64. Does nothing in a model that is folded already.

        Raises:
            ValueError: in float16, if a weight would leave the format's exact range. The model is unchanged then.
        """
        if not self.config.fold_removed:
            fold_encoder_(self.encoder_layers, [not flag for flag in self.config.attention_flags])
            self.config.fold_removed = True
            self._follow_config()

    def set_image_size(self, image_size: int | tuple[int, int]) -> None:
        """
        Change the size of images the model takes; position embeddings are interpolated (bicubic, antialiased).

        Args:
            image_size (`int` or `tuple[int, int]`): new height and width in pixels, multiples of the patch size.

        Raises:
            ValueError: if the size is no multiple of the patch size, or the present patches do not form a square.
        """
        set_image_size(self.base_model.embeddings, self.config, image_size)

    def _check_attention_exists(self, layers: list[int]) -> list[int]:
        layers = check_layer_indices(layers, len(self.encoder_layers))
        removed = [index for index in layers if self.encoder_layers[index].attention is None]
        if removed:
            raise ValueError(f"The attention of layers {removed} is removed already.")
        return layers

    def _follow_config(self) -> None:
        """Bring what the config implies up to date: LayerNorm epsilons, and what a removed layer does."""
        epsilons = folded_layer_norm_eps(self.config)
        for layer, eps in zip(self.encoder_layers, epsilons, strict=True):
            layer.layernorm_after.eps = eps
            if layer.attention is not None:
                layer.layernorm_before.eps = eps
            else:
                layer.attention_state = "folded" if self.config.fold_removed else "removed"
        self.base_model.layernorm.eps = epsilons[-1]

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, config=None, **kwargs):
        r"""
        Load a LambdaViT checkpoint, or any ViT checkpoint, in the key names of transformers 4 or 5.

        Args:
            attention_flags (`list[bool]`, *optional*):
                Start with these layers removed: the checkpoint is loaded whole, then `remove_attention` is called.
            removed_layers (`list[int]`, *optional*):
                The same by 0-based indices, such as `select_attention_layers(...).layers`.
            fold_removed (`bool`, *optional*):
                Fold after loading.
            image_size (`int` or `tuple[int, int]`, *optional*):
                Height and width of the images to come; position embeddings are interpolated.
            kwargs: everything [`PreTrainedModel.from_pretrained`] takes.

        Raises:
            ValueError: if a weight of the encoder is missing from the checkpoint, has another shape, or has no place
                in the model; if `attention_flags` asks for attention that the checkpoint no longer has.
        """
        return_info = kwargs.pop("output_loading_info", False)
        image_size = kwargs.pop("image_size", None)
        wanted = {name: kwargs.pop(name) for name in WANTED_REMOVAL if name in kwargs}
        if isinstance(config, LambdaViTConfig) and (config.removed_layers or config.fold_removed):
            flags = {} if "removed_layers" in wanted else {"attention_flags": config.attention_flags}
            wanted = {**flags, "fold_removed": config.fold_removed, **wanted}
        if wanted and pretrained_model_name_or_path is not None:
            stored, config, kwargs = read_stored_config(pretrained_model_name_or_path, config, kwargs)
            wanted = removal_to_do(stored, **wanted)
        try:
            model, info = super().from_pretrained(
                pretrained_model_name_or_path, *model_args, config=config, output_loading_info=True, **kwargs
            )
        except SafetensorError as error:
            raise OSError(
                f"The weights of {pretrained_model_name_or_path} are damaged ({error}). Download or save them again."
            ) from error
        check_loaded_weights(model.config, info, pretrained_model_name_or_path)
        for layer in model.encoder_layers:
            read_attention_state(layer)
        if wanted.get("layers"):
            model.remove_attention(wanted["layers"])
        if wanted.get("fold_removed"):
            model.fold_removed_attention()
        if image_size is not None:
            model.set_image_size(image_size)
        return (model, info) if return_info else model

    def save_pretrained(self, save_directory, *args, save_original_format: bool = False, **kwargs):
        """
        As [`PreTrainedModel.save_pretrained`], but under the names the modules have (`vit.layers.0.attention.q_proj`).

        `Trainer` restores checkpoints without renaming: with the old names it would leave most tensors as they were
        (https://github.com/huggingface/transformers/issues/48805).

        Raises:
            ValueError: if `config.attention_flags` was edited by hand and no longer describes the model.
        """
        flags = [layer.attention is not None for layer in self.encoder_layers]
        if flags != self.config.attention_flags:
            raise ValueError(
                f"`config.attention_flags` is {self.config.attention_flags}, but attention exists in {flags}."
                " Use `remove_attention` instead of editing the config."
            )
        module = type(self).__module__.rsplit(".", 1)[-1]
        # All doors, whichever class is saved: transformers would name this class alone.
        self.config.auto_map = {name: f"{module}.{kind.__name__}" for name, kind in _AUTO_CLASSES.items()}
        super().save_pretrained(save_directory, *args, save_original_format=save_original_format, **kwargs)

    def push_to_hub(self, repo_id: str, *args, **kwargs):
        """As [`PreTrainedModel.push_to_hub`]; ValueError while lambda is not 1 in a layer that has attention."""
        check_finished(self.attention_lambdas)
        return super().push_to_hub(repo_id, *args, **kwargs)


class LambdaViTModel(LambdaViTPreTrainedModel, ViTModel):
    """The bare LambdaViT. Differences from `ViTModel`: its layers are [`LambdaViTLayer`]s."""

    def __init__(self, config: LambdaViTConfig, add_pooling_layer: bool = True, use_mask_token: bool = False):
        ViTPreTrainedModel.__init__(self, config)
        self.embeddings = ViTEmbeddings(config, use_mask_token=use_mask_token)
        self.layers = nn.ModuleList([LambdaViTLayer(config, index) for index in range(config.num_hidden_layers)])
        self.layernorm = nn.LayerNorm(config.hidden_size)
        self.pooler = ViTPooler(config) if add_pooling_layer else None
        self._follow_config()
        self.post_init()


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
    """LambdaViT with a decoder for masked image modeling, as [`ViTForMaskedImageModeling`]."""

    def __init__(self, config: LambdaViTConfig):
        ViTPreTrainedModel.__init__(self, config)
        self.vit = LambdaViTModel(config, add_pooling_layer=False, use_mask_token=True)
        self.decoder = nn.Sequential(
            nn.Conv2d(config.hidden_size, config.encoder_stride**2 * config.num_channels, kernel_size=1),
            nn.PixelShuffle(config.encoder_stride),
        )
        self.post_init()


class LambdaViTBackbone(BackboneMixin, LambdaViTModel):
    """
    LambdaViT as a backbone: feature maps of the stages that `config.out_features` names, for detectors and the like.

    Differences from `LambdaViTModel`: no pooler; returns a `BackboneOutput`. A folded model gives the feature maps of
    the unfolded one, to the bit.

    Example:

    ```python
    >>> from lambda_vit_hf import LambdaViTBackbone

    >>> backbone = LambdaViTBackbone.from_pretrained("facebook/deit-base-patch16-224", out_indices=[3, 6, 9, 12])
    >>> [tuple(feature_map.shape) for feature_map in backbone(pixel_values).feature_maps]
    [(1, 768, 14, 14), (1, 768, 14, 14), (1, 768, 14, 14), (1, 768, 14, 14)]
    ```
    """

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
        scale = [1, *residual_scales(self.config.attention_flags)][stage] if self.config.fold_removed else 1
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


# Saved models carry this file and the three it imports, so that they load where the package is not installed.
_AUTO_CLASSES = {
    "AutoBackbone": LambdaViTBackbone,
    "AutoModel": LambdaViTModel,
    "AutoModelForImageClassification": LambdaViTForImageClassification,
    "AutoModelForMaskedImageModeling": LambdaViTForMaskedImageModeling,
}
for _auto_class, _model_class in _AUTO_CLASSES.items():
    _model_class.register_for_auto_class(_auto_class)

__all__ = [
    "LambdaViTBackbone",
    "LambdaViTForImageClassification",
    "LambdaViTForMaskedImageModeling",
    "LambdaViTModel",
    "LambdaViTPreTrainedModel",
]
