"""LambdaViT configuration: ViTConfig plus which attention layers exist."""

from huggingface_hub.dataclasses import strict
from transformers import ViTConfig


DROP_PATH_SCHEDULES = ("constant", "linear")


@strict
class LambdaViTConfig(ViTConfig):
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
        drop_path_rate (`float`, *optional*, defaults to 0.0):
            Stochastic depth: probability, in [0, 1), with which a residual branch is dropped per image in training.
        drop_path_schedule (`str`, *optional*, defaults to `"constant"`):
            `"constant"`: the same rate in every block. `"linear"`: grows from 0 in the first block to
            `drop_path_rate` in the last.

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
    drop_path_rate: float | int = 0.0
    drop_path_schedule: str = "constant"

    def __post_init__(self, **kwargs):
        if self.attention_flags is None:
            self.attention_flags = [True] * self.num_hidden_layers
        super().__post_init__(**kwargs)

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

    def validate_drop_path(self):
        if not 0.0 <= self.drop_path_rate < 1.0:
            raise ValueError(f"`drop_path_rate` must lie in [0, 1), got {self.drop_path_rate}.")
        if self.drop_path_schedule not in DROP_PATH_SCHEDULES:
            raise ValueError(
                f"`drop_path_schedule` must be one of {list(DROP_PATH_SCHEDULES)}, got {self.drop_path_schedule!r}."
            )

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        # transformers sets overriding arguments after validation; given to the constructor, they are validated too.
        names = [name for name in kwargs if name in cls.__dataclass_fields__ and name != "dtype"]
        overrides = {name: kwargs.pop(name) for name in names}
        return super().from_dict({**config_dict, **overrides}, **kwargs)

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


# Saved models carry this file, so that they also load where the package is not installed (`trust_remote_code=True`).
LambdaViTConfig.register_for_auto_class()

__all__ = ["LambdaViTConfig"]
