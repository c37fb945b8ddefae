"""What every family's configuration says about removed attention and merged tokens, beside transformers' own.

Source: Lin et al., "MLP Can Be A Good Transformer Learner", CVPR 2024 (arXiv 2404.05657), sections 3.3 and 3.4.
"""

import math
import numbers
from dataclasses import dataclass

from transformers.backbone_utils import BackboneConfigMixin


STAGE_ARGUMENTS = ("out_features", "out_indices")
FADES = ("identity", "skip")
_IN_PLACE_OF_ATTENTION = (*FADES, "linear")
ONLY_REPLACED = (
    "With `fade_to='linear'` attention is not removed, but replaced: fit maps with `fit_linear_maps`, then call"
    " `model.replace_attention`."
)
_ATTENTION_ARGUMENTS = ("attn_implementation", "_attn_implementation")
# Far beyond every published vision transformer: a damaged file must not take minutes to be refused.
_LARGEST = {"num_hidden_layers": 1_000, "hidden_size": 100_000, "intermediate_size": 1_000_000, "num_channels": 10_000}
_MOST_LABELS = 1_000_000


@dataclass(kw_only=True)
class RemovalConfigMixin:
    r"""
    Fields and rules that every Lambda configuration adds to that of its family. `config.json` alone rebuilds the
    module tree.

    Args:
        attention_flags (`list[bool]`, *optional*, defaults to all `True`):
            One flag per layer, index 0 nearest to the image. `False`: the layer has no attention weights and no first
            LayerNorm, and never computes attention. At least one flag must be `True`: without any attention the
            tokens would not see each other.
        fade_to (`str`, *optional*, defaults to `"identity"`):
            What attention fades to, and what is in its place once removed. `"identity"`, as in the paper: attention
            gives its input, so the block starts with `x = x + x`. `"skip"`: attention gives nothing, `x = x`.
            `"linear"`: a linear map of each token and of their mean, `x = x + W n + V mean(n) + b` with a LayerNorm
            `n` of `x`. Attention does not fade to it: `replace_attention` puts it there.
        fold_removed (`bool`, *optional*, defaults to `False`):
            How a removed layer's identity is kept. `False`: the block doubles its input, as in the paper
            (`x = 2 * x`). `True`: the factor 2 is absorbed by the weights that follow, and the block is just
            `x + MLP(LayerNorm(x))`. Both are the same function. With another `fade_to` there is nothing to fold.
        fold_exponent (`int`, *optional*, defaults to 0):
            In a folded model: what enters the first block was multiplied by 2 to this power, which centres the range
            of weights and stream for float16. Written by `fold_removed_attention`; not a choice.
        token_merging_r (`int` or `list[int]`, *optional*, defaults to 0):
            Tokens merged, from the image's most similar ones, between attention and MLP of a block that keeps
            attention. An `int`: as many in each such block from `token_merging_start` on. A list: one number per
            layer; those of layers without attention have no effect. 0: none.
        token_merging_start (`int`, *optional*, defaults to 0):
            First merging block, as an index among the blocks that have attention (of the layers `[2, 5, 7]`, 1 means
            layer 5). For an `int` `token_merging_r` only.
    """

    # `model_type`s of transformers whose checkpoints are this model with all its attention.
    source_model_types = ()

    attention_flags: list[bool] | None = None
    fade_to: str = "identity"
    fold_removed: bool = False
    fold_exponent: int = 0
    token_merging_r: int | list[int] = 0
    token_merging_start: int = 0

    def __post_init__(self, **kwargs):
        if self.attention_flags is None:
            self.attention_flags = [True] * min(max(self.num_hidden_layers, 0), _LARGEST["num_hidden_layers"])
        if kwargs.get("num_labels", 0) is None:
            del kwargs["num_labels"]
        num_labels = kwargs.get("num_labels", 0)
        if not isinstance(num_labels, numbers.Integral) or num_labels > _MOST_LABELS:  # a name is made for each
            raise ValueError(f"`num_labels` must be an integer up to {_MOST_LABELS:,}, got {num_labels}.")
        if not isinstance(self.id2label, (dict, type(None))):
            raise ValueError(f"`id2label` must map indices to class names, got {self.id2label!r}.")
        super().__post_init__(**kwargs)

    @property
    def kept_layers(self) -> list[int]:
        """0-based indices of the layers that have attention."""
        return [index for index, has_attention in enumerate(self.attention_flags) if has_attention]

    @property
    def removed_layers(self) -> list[int]:
        """0-based indices of the layers whose attention is removed."""
        return [index for index, has_attention in enumerate(self.attention_flags) if not has_attention]

    @property
    def mixing_layers(self) -> list[int]:
        """0-based indices of the layers in which a token learns of others: by attention, or by their mean."""
        return list(range(self.num_hidden_layers)) if self.fade_to == "linear" else self.kept_layers

    def as_per_layer_config(self) -> dict[str, dict]:
        """
        The removed layers in transformers' own words: `{"0": {"skip": ["attention"]}}`, by layer. ValueError where
        linear maps are in their place, which transformers has no word for.

        It is not written into config.json: transformers 5.24 takes a config that has it apart, layer by layer, though
        no vision model there reads it. True of a folded model, and with `fade_to="skip"`; else a removed layer doubles
        its input.
        """
        if self.fade_to == "linear":
            raise ValueError("transformers has no word for linear maps in the place of attention.")
        return {str(layer): {"skip": ["attention"]} for layer in self.removed_layers}

    def token_merging_schedule(self, attending: list[int] | None = None) -> list[int]:
        """
        Tokens merged in each layer, between its attention and its MLP; 0 in layers without attention.

        Args:
            attending (`list[int]`, *optional*, defaults to `kept_layers`): 0-based indices of the layers whose
                attention is wholly there. One that fades already counts as gone, so that merging is the same before
                and after its removal.
        """
        attending = self.kept_layers if attending is None else attending
        if isinstance(self.token_merging_r, list):
            wanted = dict(enumerate(self.token_merging_r))
        else:
            wanted = dict.fromkeys(attending[self.token_merging_start :], self.token_merging_r)
        return [wanted.get(index, 0) if index in attending else 0 for index in range(self.num_hidden_layers)]

    def validate_sizes(self):
        for name, largest in {**_LARGEST, "num_attention_heads": _LARGEST["hidden_size"]}.items():
            if hasattr(self, name) and not 1 <= getattr(self, name) <= largest:
                raise ValueError(f"`{name}` must lie in 1 to {largest:,}, got {getattr(self, name)}.")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"`hidden_size` ({self.hidden_size}) must be a multiple of `num_attention_heads`"
                f" ({self.num_attention_heads})."
            )
        for name in ("layer_norm_eps", "initializer_range"):
            value = getattr(self, name, 1.0)
            if not (math.isfinite(value) and 0.0 < value < 1000.0):
                raise ValueError(f"`{name}` must be a positive, finite number, got {value}.")
        for name in ("image_size", "patch_size"):
            sizes = getattr(self, name)
            sizes = sizes if isinstance(sizes, (list, tuple)) else (sizes, sizes)
            if len(sizes) != 2 or not all(1 <= size <= 100_000 for size in sizes):
                raise ValueError(f"`{name}` must be one or two positive numbers of pixels, got {getattr(self, name)}.")

    def validate_attention_flags(self):
        if len(self.attention_flags) != self.num_hidden_layers:
            raise ValueError(
                f"`attention_flags` needs one bool per layer: expected {self.num_hidden_layers} (`num_hidden_layers`),"
                f" got {len(self.attention_flags)}."
            )
        if not any(self.attention_flags):
            raise ValueError(
                "`attention_flags` removes every attention layer: no token would ever see another one. Keep at least"
                " one."
            )

    def validate_fade_to(self):
        if self.fade_to not in _IN_PLACE_OF_ATTENTION:
            raise ValueError(f"`fade_to` must be one of {list(_IN_PLACE_OF_ATTENTION)}, got {self.fade_to!r}.")
        if self.fade_to != "identity" and self.fold_removed:
            raise ValueError(f"With `fade_to={self.fade_to!r}` nothing is folded: `fold_removed` must be False.")

    def validate_fold_exponent(self):
        if self.fold_exponent and not self.fold_removed:
            raise ValueError(
                f"`fold_exponent` is {self.fold_exponent}, but `fold_removed` is False. Use `fold_removed_attention`."
            )
        if not 0 <= self.fold_exponent <= len(self.removed_layers):
            raise ValueError(
                f"`fold_exponent` must lie between 0 and the number of removed layers ({len(self.removed_layers)}),"
                f" got {self.fold_exponent}."
            )

    def validate_token_merging(self):
        r, start = self.token_merging_r, self.token_merging_start
        if any(value < 0 for value in (*(r if isinstance(r, list) else [r]), start)):
            raise ValueError(
                f"`token_merging_r` and `token_merging_start` must be integers of 0 or more, got {r} and {start}."
            )
        if isinstance(r, list):
            if len(r) != self.num_hidden_layers:
                raise ValueError(
                    f"A list of `token_merging_r` needs one number per layer: expected {self.num_hidden_layers}"
                    f" (`num_hidden_layers`), got {len(r)}."
                )
            if start:
                raise ValueError(
                    "`token_merging_start` goes with one number; a list says itself where merging starts."
                )
        elif start and start >= len(self.kept_layers):
            raise ValueError(
                f"`token_merging_start` ({start}) is an index among the layers that have attention"
                f" ({self.kept_layers}), so it must be below {len(self.kept_layers)}."
            )

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        # What the caller asks for goes first, also where transformers would prefer the file (`_attn_implementation`).
        asked = next((kwargs[name] for name in _ATTENTION_ARGUMENTS if kwargs.get(name) is not None), None)
        if asked is not None:
            config_dict = {name: value for name, value in config_dict.items() if name not in _ATTENTION_ARGUMENTS}
        # transformers sets overriding arguments after validation; given to the constructor, they are validated too.
        stages = set(STAGE_ARGUMENTS) if issubclass(cls, BackboneConfigMixin) else set()
        names = [name for name in kwargs if name in {*cls.__dataclass_fields__, *stages} - {"dtype"}]
        overrides = {name: kwargs.pop(name) for name in names}
        check_fade(config_dict, overrides.get("fade_to"))
        if not overrides.keys().isdisjoint(stages):  # stages asked for by name replace those stored by index
            config_dict = {name: value for name, value in config_dict.items() if name not in stages}
        result = super().from_dict({**config_dict, **overrides}, **kwargs)
        # Checked here, not in `get_config_dict`, which AutoConfig skips where this package is installed.
        _refuse_hub_kernel(result[0] if isinstance(result, tuple) else result, asked)
        return result

    @classmethod
    def from_json_file(cls, json_file):
        config = super().from_json_file(json_file)
        _refuse_hub_kernel(config)
        return config

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs):
        # A checkpoint of the family is a Lambda model with all its attention: take it, without transformers' warning.
        # Any other architecture under the same key names would load into the wrong arithmetic: refuse it.
        config_dict, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        model_type = config_dict.get("model_type", cls.model_type)
        if model_type in cls.source_model_types:
            # Of a model of images and texts: its vision tower, and the classes of a head that was trained on it.
            tower = config_dict.get(cls.base_config_key or "", config_dict)
            labels = {name: config_dict[name] for name in ("id2label", "label2id") if name in config_dict}
            config_dict = {**tower, **labels, "model_type": cls.model_type}
        elif model_type != cls.model_type:
            readable = ", ".join(f"`{one}`" for one in (*cls.source_model_types, cls.model_type))
            raise ValueError(
                f"{pretrained_model_name_or_path} is a `{model_type}` checkpoint; {cls.__name__} reads {readable}."
                f"{cls._advice_for(model_type)}"
            )
        return config_dict, kwargs

    @classmethod
    def _advice_for(cls, model_type: str) -> str:
        """What to do with a checkpoint of a type that this class does not read; starts with a space, or is empty."""
        return ""


def check_fade(stored: dict, wanted: str | None) -> None:
    """
    Refuse another `fade_to` for a model whose attention is removed in the one way already.

    Args:
        stored (`dict`): configuration of the checkpoint.
        wanted (`str`, *optional*): what the caller asks for.

    Raises:
        ValueError: if the model would become another function.
    """
    fade_to = stored.get("fade_to", "identity")
    if wanted not in (None, fade_to) and not all(stored.get("attention_flags") or ()):
        raise ValueError(
            f"Attention of the checkpoint was removed with `fade_to={fade_to!r}`: with {wanted!r} the model would be"
            " another function."
        )


def _refuse_hub_kernel(config, asked: str | dict | None = None) -> None:
    # A name like "user/kernel" makes transformers download that repository and run its code. Only the caller may ask
    # for it, never a file that came with the weights (CVE-2026-4372). The finished config is looked at, not the file:
    # there are several ways to say it, and `attribute_map` can rename each.
    implementation = str(config._attn_implementation)
    if "/" in implementation and implementation not in (asked.values() if isinstance(asked, dict) else [asked]):
        raise ValueError(
            f"config.json asks for the attention implementation {implementation!r}, which would run code from the Hub."
            " If you trust it, name it yourself: from_pretrained(..., attn_implementation=...). If not, pass"
            ' attn_implementation="sdpa", or delete it from config.json.'
        )
