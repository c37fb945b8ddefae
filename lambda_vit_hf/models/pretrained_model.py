"""What every LambdaViT model can do: load and save, fade, remove and fold attention, merge tokens, run faster.

Source: Lin et al., "MLP Can Be A Good Transformer Learner", CVPR 2024 (arXiv 2404.05657), sections 3.3 and 3.4.
"""

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import nn
from transformers import initialization as init
from transformers.models.vit.modeling_vit import ViTPreTrainedModel

from .blocks import LambdaViTLayer, read_attention_state
from .configuration_lambda_vit import LambdaViTConfig
from .folding import centred_exponent, check_layer_indices, fold_encoder_, folded_layer_norm_eps, residual_scales
from .inference import InferenceMixin
from .loading import (
    WANTED_REMOVAL,
    check_finished,
    check_loaded_weights,
    read_stored_config,
    removal_to_do,
    set_image_size,
)


# Every saved model names all doors, whichever class was saved: transformers would name that class alone.
AUTO_CLASSES = {
    "AutoBackbone": "LambdaViTBackbone",
    "AutoModel": "LambdaViTModel",
    "AutoModelForImageClassification": "LambdaViTForImageClassification",
    "AutoModelForMaskedImageModeling": "LambdaViTForMaskedImageModeling",
}


class LambdaViTPreTrainedModel(InferenceMixin, ViTPreTrainedModel):
    """
    Weights, loading and removal, for every LambdaViT model.

    Differences from `ViTPreTrainedModel`: `set_attention_lambda`, `remove_attention`, `fold_removed_attention`,
    `set_token_merging`, `prepare_for_inference`;
    `from_pretrained` takes any ViT checkpoint and raises where a weight of the encoder would stay random or be lost;
    `save_pretrained` writes the names the modules have, which is what `Trainer` needs to resume.
    """

    config: LambdaViTConfig
    config_class = LambdaViTConfig
    _no_split_modules = ["ViTEmbeddings", "LambdaViTLayer"]
    _keys_to_ignore_on_load_missing = [r"attention_lambda$"]
    _can_merge_tokens = True

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
        self._check_not_prepared()
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
        self._check_not_prepared()
        layers = self._check_attention_exists(layers)
        flags = [flag and index not in layers for index, flag in enumerate(self.config.attention_flags)]
        if not any(flags):
            raise ValueError(f"Removing {layers} would leave no attention at all. Keep at least one layer.")
        if self.config.token_merging_start >= sum(flags):
            raise ValueError(
                f"Removing {layers} would leave {sum(flags)} attention layers, but `token_merging_start` is"
                f" {self.config.token_merging_start}. Call `set_token_merging` after the removal."
            )
        if self.config.fold_removed:
            self._fold(flags)
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
            ValueError: in float16, if weights would leave the format's range. The model is unchanged then.
        """
        self._check_not_prepared()
        if not self.config.fold_removed:
            self._fold(self.config.attention_flags)
            self._follow_config()

    def _fold(self, attention_flags: list[bool]) -> None:
        """Divide the stream by what layers without a flag double it, as far as this has not been done."""
        config, num_layers = self.config, len(attention_flags)
        old = (
            residual_scales(config.attention_flags, config.fold_exponent) if config.fold_removed else [1] * num_layers
        )
        exponent = centred_exponent(attention_flags)
        new = residual_scales(attention_flags, exponent)
        divisors = [after / before for after, before in zip(new, old, strict=True)]
        fold_encoder_(self.base_model.embeddings, self.encoder_layers, divisors, exponent - config.fold_exponent)
        config.fold_removed, config.fold_exponent = True, exponent

    def set_token_merging(self, r: int | list[int], start: int = 0) -> None:
        """
        Merge each image's most similar tokens from now on, in blocks that keep attention (see `merging.py`). It needs
        no training, costs some accuracy, and is saved with the config. `hidden_states` have ever fewer tokens then.

        A layer that is being diluted, and a layer called by itself (as the search for layers does), merges nothing.

        Args:
            r (`int` or `list[int]`): tokens merged per block, or one number per layer; 0 switches merging off.
            start (`int`, *optional*, defaults to 0): first merging block, as an index among those with attention.

        Raises:
            ValueError: if a number is negative, the list's length is not that of the layers, `start` is no index of a
                layer with attention, or the model needs every token (backbone, masked image modeling).
        """
        old = self.config.token_merging_r, self.config.token_merging_start
        try:
            self.config.token_merging_r, self.config.token_merging_start = r, start
            self.config.validate_token_merging()
            self._follow_config()
        except (ValueError, StrictDataclassError) as error:
            self.config.token_merging_r, self.config.token_merging_start = old
            raise ValueError(f"Token merging stays as it was. {error}") from error

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
        """Bring what the config implies up to date: LayerNorm epsilons, what a removed layer does, token merging."""
        merged_tokens = self.config.token_merging_schedule()
        if any(merged_tokens) and not self._can_merge_tokens:
            raise ValueError(
                f"{type(self).__name__} needs a feature for every patch, so it cannot merge tokens. Pass"
                " `token_merging_r=0` to `from_pretrained`."
            )
        for layer, r in zip(self.encoder_layers, merged_tokens, strict=True):
            layer.merged_tokens = r
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
            ValueError: if `config.attention_flags` or the token merging of the config was edited by hand and no
                longer describes the model.
        """
        if [layer.merged_tokens for layer in self.encoder_layers] != self.config.token_merging_schedule():
            raise ValueError(
                "The config's `token_merging_r` or `token_merging_start` was edited by hand, which changes nothing in"
                " the model. Use `set_token_merging`."
            )
        flags = [layer.attention is not None for layer in self.encoder_layers]
        if flags != self.config.attention_flags:
            raise ValueError(
                f"`config.attention_flags` is {self.config.attention_flags}, but attention exists in {flags}."
                " Use `remove_attention` instead of editing the config."
            )
        module = type(self).__module__.rsplit(".", 1)[-1]
        self.config.auto_map = {name: f"{module}.{class_name}" for name, class_name in AUTO_CLASSES.items()}
        super().save_pretrained(save_directory, *args, save_original_format=save_original_format, **kwargs)

    def push_to_hub(self, repo_id: str, *args, **kwargs):
        """As [`PreTrainedModel.push_to_hub`]; ValueError while lambda is not 1 in a layer that has attention."""
        check_finished(self.attention_lambdas)
        return super().push_to_hub(repo_id, *args, **kwargs)
