"""LambdaViT configuration: ViTConfig, which attention layers exist, stochastic depth, and the stages of a backbone."""

from huggingface_hub.dataclasses import strict
from transformers import ViTConfig
from transformers.backbone_utils import BackboneConfigMixin

from .configuration_removal import STAGE_ARGUMENTS, RemovalConfigMixin


DROP_PATH_SCHEDULES = ("constant", "linear")


@strict
class LambdaViTConfig(RemovalConfigMixin, BackboneConfigMixin, ViTConfig):
    r"""
    Configuration of a LambdaViT: a ViT in which some blocks have no attention, only an MLP.

    It is a [`ViTConfig`] and takes all its arguments, and those of [`RemovalConfigMixin`]: `attention_flags`,
    `fold_removed`, `token_merging_r`, `token_merging_start`.

    Args:
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
    source_model_types = (ViTConfig.model_type,)

    drop_path_rate: float | int = 0.0
    drop_path_schedule: str = "constant"
    apply_layernorm: bool = True
    reshape_hidden_states: bool = True

    def __post_init__(self, **kwargs):
        stages = {name: kwargs.pop(name, None) for name in STAGE_ARGUMENTS}
        super().__post_init__(**kwargs)
        self.set_output_features_output_indices(**stages)

    @property
    def stage_names(self) -> list[str]:
        """Names of the feature maps a backbone can give: `"stem"`, then `"stage1"` to `"stage<num_hidden_layers>"`."""
        return ["stem", *(f"stage{index}" for index in range(1, len(self.attention_flags) + 1))]

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
            output = {name: value for name, value in output.items() if name not in STAGE_ARGUMENTS}
        return output

    def drop_path_rates(self) -> list[float]:
        """Stochastic depth rate of each layer."""
        if self.drop_path_schedule == "constant":
            return [float(self.drop_path_rate)] * self.num_hidden_layers
        last = max(self.num_hidden_layers - 1, 1)
        return [self.drop_path_rate * index / last for index in range(self.num_hidden_layers)]

    def validate_drop_path(self):
        if not 0.0 <= self.drop_path_rate < 1.0:
            raise ValueError(f"`drop_path_rate` must lie in [0, 1), got {self.drop_path_rate}.")
        if self.drop_path_schedule not in DROP_PATH_SCHEDULES:
            raise ValueError(
                f"`drop_path_schedule` must be one of {list(DROP_PATH_SCHEDULES)}, got {self.drop_path_schedule!r}."
            )

    @classmethod
    def _advice_for(cls, model_type: str) -> str:
        if model_type != "deit":
            return ""
        return (
            " DeiT with a distillation token is another family, for every attention layer mixes that token in. Or take"
            " the checkpoint trained without it, such as facebook/deit-base-patch16-224 (`vit`)."
        )


# Saved models carry this file, so that they also load where the package is not installed (`trust_remote_code=True`).
LambdaViTConfig.register_for_auto_class()

__all__ = ["LambdaViTConfig"]
