"""LambdaDeiT configuration: DeiTConfig, and which attention layers exist."""

from huggingface_hub.dataclasses import strict
from transformers import DeiTConfig

from .configuration_removal import RemovalConfigMixin


@strict
class LambdaDeiTConfig(RemovalConfigMixin, DeiTConfig):
    r"""
    Configuration of a DeiT with distillation token in which some blocks have no attention.
    It takes all arguments of [`DeiTConfig`] and [`RemovalConfigMixin`].
    """

    model_type = "lambda_deit"
    source_model_types = ("deit",)


LambdaDeiTConfig.register_for_auto_class()

__all__ = ["LambdaDeiTConfig"]
