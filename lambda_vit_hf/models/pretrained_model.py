"""What every Lambda model can do, of any family: load and save, fade, remove and fold attention, merge tokens.

A family mixes [`LambdaPreTrainedModel`] into transformers' own classes and says where its parts are. Shapes:
`(batch, tokens, hidden)`.

Source: Lin et al., "MLP Can Be A Good Transformer Learner", CVPR 2024 (arXiv 2404.05657), sections 3.3 and 3.4.
"""

import re
from collections.abc import Callable
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import initialization as init

from .attention_removal import AttentionRemovalMixin
from .blocks import RemovableAttention, note_attention_state
from .checksums import check_checksums, remove_checksums
from .configuration_removal import RemovalConfigMixin
from .features import FeaturesMixin
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


_NEW_HEAD = "newly_initialized_head"  # in config.json


class LambdaPreTrainedModel(AttentionRemovalMixin, FeaturesMixin, InferenceMixin):
    """
    Mixin in front of a family's `...PreTrainedModel` of transformers.

    Differences: `set_attention_lambda`, `remove_attention`, `fold_removed_attention`, `set_token_merging`,
    `prepare_for_inference`; `from_pretrained` takes any checkpoint of the family and raises where a weight of the
    encoder would stay random or be lost; `save_pretrained` writes the names that the modules have, which is what
    `Trainer` needs to resume.

    A family sets, besides what the mixins ask for:

    - `_head_keys`: pattern of weights that are no part of the encoder: they may be missing, or left over;
    - `_auto_classes`: Auto classes and the names of the family's classes that they open;
    - `_can_merge_tokens`: whether a class can do with fewer tokens;
    - `_fit_image_size`: how embeddings and config are fitted to images of another size.
    """

    _keys_to_ignore_on_load_missing = [r"attention_lambda$"]
    _head_keys = r"(^|\.)(\w*classifier|pooler|decoder|mask_token)(\.|$)"
    _auto_classes: dict[str, str] = {}
    _can_merge_tokens = True
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

    def set_token_merging(self, r: int | list[int], start: int = 0) -> None:
        """
        Merge each image's most similar tokens from now on, in blocks that keep attention (see `token_merging.py`). It
        needs no training, costs some accuracy, and is saved with the config. `hidden_states` have ever fewer tokens
        then. What leaves the last block has a feature for each patch again where the classifier reads patches
        (DINOv2, SigLIP, CLIP); where it does not (ViT, DeiT), the tokens that are left.

        A layer that is being diluted counts as gone, and a layer called by itself (as the search for layers does)
        merges nothing.

        Args:
            r (`int` or `list[int]`): tokens merged per block, or one number per layer; 0 switches merging off.
            start (`int`, *optional*, defaults to 0): first merging block, as an index among those with attention.

        Raises:
            ValueError: if a number is negative, the list's length is not that of the layers, `start` is no index of a
                layer with attention, or the model needs every token (backbones, masked image modeling, DINOv3).
        """
        self._check_not_prepared()
        old = self.config.token_merging_r, self.config.token_merging_start
        try:
            self.config.token_merging_r, self.config.token_merging_start = _plain_integers(r), _plain_integers(start)
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
        self._fit_image_size(self.base_model.embeddings, self.config, _plain_integers(image_size))

    def _check_merging_is_possible(self) -> None:
        if any(self.config.token_merging_schedule()) and not self._can_merge_tokens:
            raise ValueError(
                f"{type(self).__name__} cannot merge tokens: its blocks need every patch, for maps of features or for"
                " rotary positions. Pass `token_merging_r=0` to `from_pretrained`."
            )

    def _follow_config(self) -> None:
        """What a new model does to be what its config says."""
        self._check_merging_is_possible()
        self._set_epsilons()

    def _run_blocks(self, forward: Callable, inputs: torch.Tensor, attention_mask=None, **kwargs):
        """
        transformers' `forward` of what loops over the blocks, with what they have to know of this call where tokens
        get fewer.

        Recorded `hidden_states` of a folded model are given as the paper's, as large as in an unfolded one.
        """
        return_dict = kwargs.pop("return_dict", self.config.return_dict)
        kwargs = self._with_token_flow(attention_mask, kwargs)
        outputs = forward(inputs, attention_mask=attention_mask, return_dict=True, **kwargs)
        if outputs.hidden_states is not None and self.config.fold_removed:
            pairs = zip(outputs.hidden_states, self.stream_scales(), strict=True)
            outputs["hidden_states"] = tuple(None if x is None else x * scale for x, scale in pairs)
        return outputs if return_dict else outputs.to_tuple()

    def _with_token_flow(self, attention_mask, kwargs: dict) -> dict:
        """`kwargs` of a call with what its blocks share where tokens get fewer; who called may have made it."""
        if "token_flow" in kwargs:
            return kwargs
        states = [layer.attention_state for layer in self.encoder_layers]
        schedule = self.config.token_merging_schedule([i for i, state in enumerate(states) if state == "kept"])
        recorded = any(
            kwargs.get(name, getattr(self.config, name, False))
            for name in ("output_hidden_states", "output_attentions")
        )
        only_class_token = self.class_token_only and attention_mask is None and not recorded
        if any(schedule):
            self._check_merging(attention_mask)
        elif not only_class_token:
            return kwargs
        last = self.config.mixing_layers[-1] if only_class_token else None
        flow = TokenFlow(schedule, recorded, last, self.num_prefix_tokens, restores_patches=self.reads_patches)
        return {**kwargs, "token_flow": flow}

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
            OSError: if the weights are cut short, or a file is not what the folder's `SHA256SUMS` lists.
        """
        if pretrained_model_name_or_path is not None:
            check_checksums(Path(pretrained_model_name_or_path, kwargs.get("subfolder") or ""), is_complete=False)
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
        if vars(self.config).pop(_NEW_HEAD, False):  # drawn by the model that was saved
            drawn = [name for name, _ in self.named_parameters()]
        drawn = [key for key in drawn if key.endswith("classifier.weight")]
        self._drawn_heads = {key: self.get_parameter(key).detach().cpu().clone() for key in drawn}

    def save_pretrained(
        self, save_directory, is_main_process: bool = True, *args, save_original_format: bool = False, **kwargs
    ):
        """
        As [`PreTrainedModel.save_pretrained`], but under the names the modules have (`vit.layers.0.attention.q_proj`).

        `Trainer` restores checkpoints without renaming: with the old names it would leave most tensors as they were
        (https://github.com/huggingface/transformers/issues/48805). Weights of an earlier save in the other form (one
        file, or parts) are deleted afterwards, and so is `SHA256SUMS`: whoever finishes the folder lists it anew.

        Raises:
            ValueError: if `config.attention_flags` or `config.fade_to` was edited by hand and no longer describes the
                model.
        """
        flags = [layer.has_attention for layer in self.encoder_layers]
        if flags != self.config.attention_flags:
            raise ValueError(
                f"`config.attention_flags` is {self.config.attention_flags}, but attention exists in {flags}."
                " Use `remove_attention` instead of editing the config."
            )
        self._check_maps()
        vars(self.config).pop(_NEW_HEAD, None)
        if self.newly_initialized_head:  # so that who loads it knows, too
            setattr(self.config, _NEW_HEAD, True)
        module = type(self).__module__.rsplit(".", 1)[-1]
        self.config.auto_map = {name: f"{module}.{class_name}" for name, class_name in self._auto_classes.items()}
        super().save_pretrained(
            save_directory, is_main_process, *args, save_original_format=save_original_format, **kwargs
        )
        if is_main_process:
            remove_other_form(save_directory)
            remove_checksums(save_directory)

    def push_to_hub(self, repo_id: str, *args, **kwargs):
        """As [`PreTrainedModel.push_to_hub`]; ValueError while lambda is not 1 in a layer that has attention."""
        check_finished(self.attention_lambdas)
        return super().push_to_hub(repo_id, *args, **kwargs)


def _plain_integers(value):
    """Numbers and lists of Python's own, of numpy's or torch's, as config.json can hold them."""
    value = value.tolist() if hasattr(value, "tolist") else value
    return [_plain_integers(one) for one in value] if isinstance(value, (list, tuple)) else value
