"""LambdaViT configuration: ViTConfig plus which attention layers exist."""

from huggingface_hub.dataclasses import strict
from transformers import ViTConfig
from transformers.backbone_utils import BackboneConfigMixin


DROP_PATH_SCHEDULES = ("constant", "linear")
_STAGE_ARGUMENTS = ("out_features", "out_indices")
_ATTENTION_ARGUMENTS = ("attn_implementation", "_attn_implementation")


@strict
class LambdaViTConfig(BackboneConfigMixin, ViTConfig):
    r"""
    Configuration of a LambdaViT: a ViT in which some blocks have no attention, only an MLP.

    It is a [`ViTConfig`] and takes all its arguments. `config.json` alone rebuilds the module tree.

    Args:
        attention_flags (`list[bool]`, *optional*, defaults to all `True`):
            One flag per layer, index 0 nearest to the image. `False`: the layer has no attention weights and no first
            LayerNorm, and never computes attention. At least one flag must be `True`: without any attention the class
            token would not see the image.
        fold_removed (`bool`, *optional*, defaults to `False`):
            How a removed layer's identity is kept. `False`: the block doubles its input, as in the paper
            (`x = 2 * x`). `True`: the factor 2 is absorbed by the weights that follow, and the block is just
            `x + MLP(LayerNorm(x))`. Both are the same function.
        fold_exponent (`int`, *optional*, defaults to 0):
            In a folded model: the embeddings were multiplied by 2 to this power, which centres the range of weights
            and stream for float16. Written by `fold_removed_attention`; not a choice.
        token_merging_r (`int` or `list[int]`, *optional*, defaults to 0):
            Tokens merged, from the image's most similar ones, between attention and MLP of a block that keeps
            attention. An `int`: as many in each such block from `token_merging_start` on. A list: one number per
            layer; those of layers without attention have no effect. 0: none.
        token_merging_start (`int`, *optional*, defaults to 0):
            First merging block, as an index among the blocks that have attention (of the layers `[2, 5, 7]`, 1 means
            layer 5). For an `int` `token_merging_r` only.
        drop_path_rate (`float`, *optional*, defaults to 0.0):
            Stochastic depth: probability, in [0, 1), with which a residual branch is dropped per image in training.
        drop_path_schedule (`str`, *optional*, defaults to `"constant"`):
            `"constant"`: the same rate in every block. `"linear"`: grows from 0 in the first block to
            `drop_path_rate` in the last.
        out_features (`list[str]`, *optional*, defaults to the last stage):
            Stages whose feature maps a [`LambdaViTBackbone`] gives: of `"stem"` (the embeddings), `"stage1"` (after
            the first block) and so on, in this order.
        out_indices (`list[int]`, *optional*):
            The same by index: 0 is the stem; negative ones count from the end.
        apply_layernorm (`bool`, *optional*, defaults to `True`):
            Whether a backbone's feature maps pass the model's last LayerNorm.
        reshape_hidden_states (`bool`, *optional*, defaults to `True`):
            Shape of a backbone's feature maps. `True`: `(batch, hidden, height, width)`, without the class token.
            `False`: `(batch, tokens, hidden)`.

    Source: Lin et al., "MLP Can Be A Good Transformer Learner", CVPR 2024, sections 3.3 and 3.4.

    Example:

    ```python
    >>> from lambda_vit_hf import LambdaViTConfig, LambdaViTForImageClassification

    >>> config = LambdaViTConfig(num_hidden_layers=4, attention_flags=[True, False, True, True])
    >>> model = LambdaViTForImageClassification(config)
    >>> config.removed_layers
    [1]
    ```
    """

    model_type = "lambda_vit"

    attention_flags: list[bool] | None = None
    fold_removed: bool = False
    fold_exponent: int = 0
    token_merging_r: int | list[int] = 0
    token_merging_start: int = 0
    drop_path_rate: float | int = 0.0
    drop_path_schedule: str = "constant"
    apply_layernorm: bool = True
    reshape_hidden_states: bool = True

    def __post_init__(self, **kwargs):
        if self.attention_flags is None:
            self.attention_flags = [True] * self.num_hidden_layers
        self.set_output_features_output_indices(**{name: kwargs.pop(name, None) for name in _STAGE_ARGUMENTS})
        super().__post_init__(**kwargs)

    @property
    def stage_names(self) -> list[str]:
        """Names of the feature maps a backbone can give: `"stem"`, then `"stage1"` to `"stage<num_hidden_layers>"`."""
        return ["stem", *(f"stage{index}" for index in range(1, self.num_hidden_layers + 1))]

    def set_output_features_output_indices(self, out_features, out_indices):
        """
        Choose the stages of a backbone, by name or by index; without either, the last.

        Raises:
            ValueError: if a stage is unknown, repeated or out of order, or if names and indices disagree.
        """
        # transformers wraps an index like -20 around, and stops at a string with a TypeError.
        num_stages = len(self.stage_names)
        for index in out_indices or ():
            if isinstance(index, bool) or not isinstance(index, int) or not -num_stages <= index < num_stages:
                raise ValueError(
                    f"`out_indices` must hold integers from {-num_stages} to {num_stages - 1}, one per stage of"
                    f" {self.stage_names}, got {index!r} in {out_indices}."
                )
        super().set_output_features_output_indices(out_features, out_indices)

    def to_dict(self) -> dict:
        # The default is left out: it follows `num_hidden_layers`, and most models are no backbones.
        output = super().to_dict()
        if output["out_features"] == self.stage_names[-1:]:
            output = {name: value for name, value in output.items() if name not in _STAGE_ARGUMENTS}
        return output

    @property
    def kept_layers(self) -> list[int]:
        """0-based indices of the layers that have attention."""
        return [index for index, has_attention in enumerate(self.attention_flags) if has_attention]

    @property
    def removed_layers(self) -> list[int]:
        """0-based indices of the layers whose attention is removed."""
        return [index for index, has_attention in enumerate(self.attention_flags) if not has_attention]

    def drop_path_rates(self) -> list[float]:
        """Stochastic depth rate of each layer."""
        if self.drop_path_schedule == "constant":
            return [float(self.drop_path_rate)] * self.num_hidden_layers
        last = max(self.num_hidden_layers - 1, 1)
        return [self.drop_path_rate * index / last for index in range(self.num_hidden_layers)]

    def token_merging_schedule(self) -> list[int]:
        """Tokens merged in each layer, between its attention and its MLP; 0 in layers without attention."""
        if isinstance(self.token_merging_r, list):
            wanted = self.token_merging_r
        else:
            merging = set(self.kept_layers[self.token_merging_start :])
            wanted = [self.token_merging_r if index in merging else 0 for index in range(self.num_hidden_layers)]
        return [r if flag else 0 for r, flag in zip(wanted, self.attention_flags, strict=True)]

    def validate_sizes(self):
        for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "num_channels"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"`hidden_size` ({self.hidden_size}) must be a multiple of `num_attention_heads`"
                f" ({self.num_attention_heads})."
            )

    def validate_attention_flags(self):
        if len(self.attention_flags) != self.num_hidden_layers:
            raise ValueError(
                f"`attention_flags` needs one bool per layer: expected {self.num_hidden_layers} (`num_hidden_layers`),"
                f" got {len(self.attention_flags)}."
            )
        if not any(self.attention_flags):
            raise ValueError(
                "`attention_flags` removes every attention layer: the class token would never see the image."
                " Keep at least one."
            )

    def validate_fold_exponent(self):
        if self.fold_exponent and not self.fold_removed:
            raise ValueError(
                f"`fold_exponent` is {self.fold_exponent}, but `fold_removed` is False. Use `fold_removed_attention`."
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

    def validate_drop_path(self):
        if not 0.0 <= self.drop_path_rate < 1.0:
            raise ValueError(f"`drop_path_rate` must lie in [0, 1), got {self.drop_path_rate}.")
        if self.drop_path_schedule not in DROP_PATH_SCHEDULES:
            raise ValueError(
                f"`drop_path_schedule` must be one of {list(DROP_PATH_SCHEDULES)}, got {self.drop_path_schedule!r}."
            )

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        # What the caller asks for goes first, also where transformers would prefer the file (`_attn_implementation`).
        asked = next((kwargs[name] for name in _ATTENTION_ARGUMENTS if kwargs.get(name) is not None), None)
        if asked is not None:
            config_dict = {name: value for name, value in config_dict.items() if name not in _ATTENTION_ARGUMENTS}
        # transformers sets overriding arguments after validation; given to the constructor, they are validated too.
        names = [name for name in kwargs if name in {*cls.__dataclass_fields__, *_STAGE_ARGUMENTS} - {"dtype"}]
        overrides = {name: kwargs.pop(name) for name in names}
        if not overrides.keys().isdisjoint(_STAGE_ARGUMENTS):  # stages asked for by name replace those stored by index
            config_dict = {name: value for name, value in config_dict.items() if name not in _STAGE_ARGUMENTS}
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
        # A ViT checkpoint is a LambdaViT with all its attention: take it, without transformers' warning. Any other
        # architecture under the same key names would load into the wrong arithmetic: refuse it.
        config_dict, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        model_type = config_dict.get("model_type", cls.model_type)
        if model_type == ViTConfig.model_type:
            config_dict = {**config_dict, "model_type": cls.model_type}
        elif model_type == "deit":
            raise ValueError(
                f"{pretrained_model_name_or_path} is a DeiT with a distillation token (`deit`), which every attention"
                " layer mixes in; LambdaViT has only the class token. Take the checkpoint trained without it, such as"
                " facebook/deit-base-patch16-224 (`vit`)."
            )
        elif model_type != cls.model_type:
            raise ValueError(
                f"{pretrained_model_name_or_path} is a `{model_type}` checkpoint; LambdaViT reads"
                f" `{ViTConfig.model_type}` and `{cls.model_type}` checkpoints."
            )
        return config_dict, kwargs


def _refuse_hub_kernel(config: LambdaViTConfig, asked: str | dict | None = None) -> None:
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


# Saved models carry this file, so that they also load where the package is not installed (`trust_remote_code=True`).
LambdaViTConfig.register_for_auto_class()

__all__ = ["LambdaViTConfig"]
