"""What every Lambda model can do, of any family: load and save, fade, remove and fold attention, merge tokens.

A family mixes [`LambdaPreTrainedModel`] into transformers' own classes and says where its parts are. Shapes:
`(batch, tokens, hidden)`.

Source: Lin et al., "MLP Can Be A Good Transformer Learner", CVPR 2024 (arXiv 2404.05657), sections 3.3 and 3.4.
"""

import re
from collections.abc import Callable

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import nn
from transformers import initialization as init

from .blocks import RemovableAttention, note_attention_state
from .configuration_removal import RemovalConfigMixin
from .folding import centred_exponent, check_layer_indices, fold_encoder_, folded_layer_norm_eps, residual_scales
from .image_size import set_image_size
from .inference import InferenceMixin
from .loading import (
    WANTED_REMOVAL,
    check_finished,
    check_loaded_weights,
    check_weight_files,
    read_stored_config,
    removal_to_do,
    remove_other_form,
)
from .token_merging import TokenFlow


class LambdaPreTrainedModel(InferenceMixin):
    """
    Mixin in front of a family's `...PreTrainedModel` of transformers.

    Differences: `set_attention_lambda`, `remove_attention`, `fold_removed_attention`, `set_token_merging`,
    `prepare_for_inference`; `from_pretrained` takes any checkpoint of the family and raises where a weight of the
    encoder would stay random or be lost; `save_pretrained` writes the names that the modules have, which is what
    `Trainer` needs to resume.

    A family sets:

    - `_layers`, `_final_norm`: names of the blocks and of the LayerNorm behind them, within the base model;
    - `_stream_entry`: name of the module that gives the first block its input;
    - `_head_keys`: pattern of weights that are no part of the encoder: they may be missing, or left over;
    - `_auto_classes`: Auto classes and the names of the family's classes that they open;
    - `_can_merge_tokens`: whether a class can do with fewer tokens;
    - `_fit_image_size`: how embeddings and config are fitted to images of another size;
    - `_head_reads`: what its classifier reads: `"class_token"`, `"patch_mean"` or `"class_token_and_patch_mean"`;
      `_head_reads_norm`: whether behind the last LayerNorm; `_num_special_tokens`: tokens in front of those of
      patches, besides registers.
    """

    _keys_to_ignore_on_load_missing = [r"attention_lambda$"]
    _layers, _final_norm, _stream_entry = "layers", "layernorm", "embeddings"
    _head_keys = r"(^|\.)(\w*classifier|pooler|decoder|mask_token)(\.|$)"
    _auto_classes: dict[str, str] = {}
    _can_merge_tokens = True
    _head_reads, _head_reads_norm, _num_special_tokens = "class_token", True, 1
    _fit_image_size = staticmethod(set_image_size)

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, RemovableAttention) and module.has_attention:
            init.ones_(module.attention_lambda)

    @classmethod
    def is_head_key(cls, key: str) -> bool:
        """Whether a weight of this name is no part of the encoder."""
        return re.search(cls._head_keys, key) is not None

    @property
    def encoder_layers(self) -> nn.ModuleList:
        """The blocks, index 0 nearest to the image."""
        return self.base_model.get_submodule(self._layers)

    @property
    def attention_lambdas(self) -> list[float | None]:
        """Lambda of each layer; `None` where attention is removed."""
        return [layer.attention_lambda.item() if layer.has_attention else None for layer in self.encoder_layers]

    @property
    def has_class_head(self) -> bool:
        """Whether the model gives logits of classes."""
        return any(name.endswith("classifier") for name, _ in self.named_children())

    @property
    def newly_initialized_head(self) -> bool:
        """Whether the class head is random: its weights were not in the checkpoint, nor have they been trained."""
        drawn = getattr(self, "_drawn_heads", {})
        weights = {name: self.get_parameter(name).detach().cpu() for name in drawn}
        return any(torch.equal(weights[name], value.to(weights[name].dtype)) for name, value in drawn.items())

    @newly_initialized_head.setter
    def newly_initialized_head(self, value: bool) -> None:
        if value:
            raise ValueError("Loading finds out whether a head is new; it can only be said to be trained.")
        self._drawn_heads = {}

    @property
    def num_prefix_tokens(self) -> int:
        """Tokens in front of those of patches: class token, distillation token, registers."""
        return self._num_special_tokens + getattr(self.config, "num_register_tokens", 0)

    def embed(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, dict]:
        """What enters the first block, `(batch, tokens, hidden)`, and what each block is called with besides."""
        return self.base_model.embeddings(pixel_values), {}

    def read_out(self, hidden_states: torch.Tensor, output: str) -> torch.Tensor:
        """
        What the model makes of what leaves its last block, for blocks that are called one by one.

        Args:
            hidden_states (`torch.Tensor` of shape `(batch, tokens, hidden)`): the stream after the last block.
            output (`str`): `"class_head"`: the logits, `(batch, classes)`; `"class_token"`: its features behind the
                last LayerNorm (without class token: what the model pools); `"token_mean"`: the mean over all tokens
                there; both `(batch, hidden)`.
        """
        tokens = self.base_model.get_submodule(self._final_norm)(hidden_states)
        if output == "token_mean":
            return tokens.mean(dim=1)
        if output == "class_token":
            return self.pool(tokens)
        return self.classify(self.head_input(tokens if self._head_reads_norm else hidden_states))

    def reads_class_token_only(self, output: str) -> bool:
        """Whether an output, as in `read_out`, depends on the other tokens through attention only."""
        if output == "class_head":
            return self._head_reads == "class_token" and self.has_class_head
        return output == "class_token" and self._num_special_tokens > 0

    def pool(self, tokens: torch.Tensor) -> torch.Tensor:
        """One vector for an image, `(batch, hidden)`, of tokens behind the last LayerNorm."""
        return tokens[:, 0]

    def head_input(self, tokens: torch.Tensor) -> torch.Tensor:
        """What the class head reads of `last_hidden_state`, `(batch, features)`."""
        if self._head_reads == "class_token":
            return tokens[:, 0]
        patch_mean = tokens[:, self.num_prefix_tokens :].mean(dim=1)
        return patch_mean if self._head_reads == "patch_mean" else torch.cat([tokens[:, 0], patch_mean], dim=1)

    def classify(self, features: torch.Tensor) -> torch.Tensor:
        """Logits `(batch, classes)` of what the class head reads."""
        return self.classifier(features)

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
            self.encoder_layers[index].drop_attention()
        self.config.attention_flags = flags
        self._set_epsilons()

    def fold_removed_attention(self) -> None:
        """
        Absorb the doubling of removed layers in the weights that follow; the function stays the same, to the bit in
        float32, bfloat16 and float64. Does nothing in a model that is folded already.

        Raises:
            ValueError: in float16, if weights would leave the format's range; if adapters or quantised layers stand
                where weights must be divided. The model is unchanged then.
        """
        self._check_not_prepared()
        if not self.config.fold_removed:
            self._fold(self.config.attention_flags)
            self._set_epsilons()

    def _fold(self, attention_flags: list[bool]) -> None:
        """Divide the stream by what layers without a flag double it, as far as this has not been done."""
        config, old = self.config, self.stream_scales()[1:]
        exponent = centred_exponent(attention_flags)
        new = residual_scales(attention_flags, exponent)
        divisors = [after / before for after, before in zip(new, old, strict=True)]
        entry = self.base_model.get_submodule(self._stream_entry)
        fold_encoder_(entry, self.encoder_layers, divisors, exponent - config.fold_exponent)
        config.fold_removed, config.fold_exponent = True, exponent

    def stream_scales(self) -> list[float]:
        """What the stored stream is smaller by than the paper's: before the first block, then after each block."""
        config = self.config
        if not config.fold_removed:
            return [1.0] * (config.num_hidden_layers + 1)
        return [2.0**-config.fold_exponent, *residual_scales(config.attention_flags, config.fold_exponent)]

    def set_token_merging(self, r: int | list[int], start: int = 0) -> None:
        """
        Merge each image's most similar tokens from now on, in blocks that keep attention (see `token_merging.py`). It
        needs no training, costs some accuracy, and is saved with the config. `hidden_states` have ever fewer tokens
        then.

        A layer that is being diluted counts as gone, and a layer called by itself (as the search for layers does)
        merges nothing.

        Args:
            r (`int` or `list[int]`): tokens merged per block, or one number per layer; 0 switches merging off.
            start (`int`, *optional*, defaults to 0): first merging block, as an index among those with attention.

        Raises:
            ValueError: if a number is negative, the list's length is not that of the layers, `start` is no index of a
                layer with attention, or the model needs every token (backbone, masked image modeling).
        """
        self._check_not_prepared()
        old = self.config.token_merging_r, self.config.token_merging_start
        try:
            self.config.token_merging_r, self.config.token_merging_start = r, start
            self.config.validate_token_merging()
            self._check_merging_is_possible()
        except (ValueError, StrictDataclassError) as error:
            self.config.token_merging_r, self.config.token_merging_start = old
            raise ValueError(f"Token merging stays as it was. {error}") from error

    def set_image_size(self, image_size: int | tuple[int, int]) -> None:
        """
        Change the size of images the model takes; stored position embeddings are interpolated: those of ViT and DeiT
        bicubic and antialiased, as by timm; of other families as they themselves do at every call for images of
        another size, so that their outputs stay the same, to the bit.

        Args:
            image_size (`int` or `tuple[int, int]`):
                new height and width in pixels, multiples of the patch size. DINOv2, SigLIP and CLIP: a square.

        Raises:
            ValueError: if the family cannot take this size. The model is unchanged then.
        """
        self._check_not_prepared()
        self._fit_image_size(self.base_model.embeddings, self.config, image_size)

    def _check_attention_exists(self, layers: list[int]) -> list[int]:
        layers = check_layer_indices(layers, len(self.encoder_layers))
        removed = [index for index in layers if not self.encoder_layers[index].has_attention]
        if removed:
            raise ValueError(f"The attention of layers {removed} is removed already.")
        return layers

    def _check_merging_is_possible(self) -> None:
        if any(self.config.token_merging_schedule()) and not self._can_merge_tokens:
            raise ValueError(
                f"{type(self).__name__} needs a feature for every patch, so it cannot merge tokens. Pass"
                " `token_merging_r=0` to `from_pretrained`."
            )

    def _follow_config(self) -> None:
        """What a new model does to be what its config says."""
        self._check_merging_is_possible()
        self._set_epsilons()

    def _set_epsilons(self) -> None:
        """Bring the LayerNorms that read the stream in line with the config: a folded stream needs smaller ones."""
        epsilons = folded_layer_norm_eps(self.config)
        for layer, eps in zip(self.encoder_layers, epsilons, strict=True):
            for norm in layer.stream_norms():
                norm.eps = eps
        if self._final_norm is not None:
            self.base_model.get_submodule(self._final_norm).eps = epsilons[-1]

    def _run_blocks(self, forward: Callable, inputs: torch.Tensor, attention_mask=None, **kwargs):
        """
        transformers' `forward` of what loops over the blocks, with what they have to know of this call where tokens
        get fewer.

        Recorded `hidden_states` of a folded model are given as the paper's, as large as in an unfolded one.
        """
        return_dict = kwargs.pop("return_dict", self.config.return_dict)
        states = [layer.attention_state for layer in self.encoder_layers]
        schedule = self.config.token_merging_schedule([i for i, state in enumerate(states) if state == "kept"])
        recorded = any(
            kwargs.get(name, getattr(self.config, name, False))
            for name in ("output_hidden_states", "output_attentions")
        )
        only_class_token = self.class_token_only and attention_mask is None and not recorded
        if any(schedule):
            self._check_merging(attention_mask)
        if any(schedule) or only_class_token:
            last = self.config.kept_layers[-1] if only_class_token else None
            kwargs["token_flow"] = TokenFlow(schedule, last)
        outputs = forward(inputs, attention_mask=attention_mask, return_dict=True, **kwargs)
        if outputs.hidden_states is not None and self.config.fold_removed:
            pairs = zip(outputs.hidden_states, self.stream_scales(), strict=True)
            outputs["hidden_states"] = tuple(None if x is None else x * scale for x, scale in pairs)
        return outputs if return_dict else outputs.to_tuple()

    def _check_merging(self, attention_mask) -> None:
        self._check_merging_is_possible()
        if attention_mask is not None:
            raise ValueError("Token merging takes no `attention_mask`: merged tokens have no place in it. Pass None.")
        if self.config._attn_implementation not in (None, "eager", "sdpa"):
            raise ValueError(
                "Token merging weighs keys by their sizes, which needs attention with an additive mask: use"
                f' attn_implementation="sdpa" or "eager", not {self.config._attn_implementation!r}.'
            )

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, config=None, **kwargs):
        r"""
        Load a Lambda checkpoint, or any checkpoint of the family, in the key names of transformers 4 or 5.

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
            ValueError: if a weight of the encoder is missing from the checkpoint, has another shape, is no number, or
                has no place in the model; if weights are there twice; if `attention_flags` asks for attention that the
                checkpoint no longer has.
        """
        return_info = kwargs.pop("output_loading_info", False)
        image_size = kwargs.pop("image_size", None)
        wanted = {name: kwargs.pop(name) for name in WANTED_REMOVAL if name in kwargs}
        if isinstance(config, RemovalConfigMixin) and (config.removed_layers or config.fold_removed):
            flags = {} if "removed_layers" in wanted else {"attention_flags": config.attention_flags}
            wanted = {**flags, "fold_removed": config.fold_removed, **wanted}
        if wanted and pretrained_model_name_or_path is not None:
            stored, config, kwargs = read_stored_config(
                cls.config_class, pretrained_model_name_or_path, config, kwargs
            )
            wanted = removal_to_do(stored, **wanted)
        try:
            if pretrained_model_name_or_path is not None:
                check_weight_files(pretrained_model_name_or_path)
            model, info = super().from_pretrained(
                pretrained_model_name_or_path, *model_args, config=config, output_loading_info=True, **kwargs
            )
        except SafetensorError as error:
            raise OSError(
                f"The weights of {pretrained_model_name_or_path} are damaged ({error}). Download or save them again."
            ) from error
        check_loaded_weights(model, info, pretrained_model_name_or_path)
        model._after_loading(info)
        if wanted.get("layers"):
            model.remove_attention(wanted["layers"])
        if wanted.get("fold_removed"):
            model.fold_removed_attention()
        if image_size is not None:
            model.set_image_size(image_size)
        return (model, info) if return_info else model

    def _after_loading(self, info: dict) -> None:
        for layer in self.encoder_layers:
            note_attention_state(layer)
        drawn = [*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])]
        drawn = [key for key in drawn if key.endswith("classifier.weight")]
        self._drawn_heads = {key: self.get_parameter(key).detach().cpu().clone() for key in drawn}

    def save_pretrained(
        self, save_directory, is_main_process: bool = True, *args, save_original_format: bool = False, **kwargs
    ):
        """
        As [`PreTrainedModel.save_pretrained`], but under the names the modules have (`vit.layers.0.attention.q_proj`).

        `Trainer` restores checkpoints without renaming: with the old names it would leave most tensors as they were
        (https://github.com/huggingface/transformers/issues/48805). Weights of an earlier save in the other form (one
        file, or parts) are deleted afterwards.

        Raises:
            ValueError: if `config.attention_flags` was edited by hand and no longer describes the model.
        """
        flags = [layer.has_attention for layer in self.encoder_layers]
        if flags != self.config.attention_flags:
            raise ValueError(
                f"`config.attention_flags` is {self.config.attention_flags}, but attention exists in {flags}."
                " Use `remove_attention` instead of editing the config."
            )
        module = type(self).__module__.rsplit(".", 1)[-1]
        self.config.auto_map = {name: f"{module}.{class_name}" for name, class_name in self._auto_classes.items()}
        super().save_pretrained(
            save_directory, is_main_process, *args, save_original_format=save_original_format, **kwargs
        )
        if is_main_process:
            remove_other_form(save_directory)

    def push_to_hub(self, repo_id: str, *args, **kwargs):
        """As [`PreTrainedModel.push_to_hub`]; ValueError while lambda is not 1 in a layer that has attention."""
        check_finished(self.attention_lambdas)
        return super().push_to_hub(repo_id, *args, **kwargs)
