"""LambdaDinov2WithRegisters configuration: Dinov2WithRegistersConfig, and which attention layers exist."""

from huggingface_hub.dataclasses import strict
from transformers import Dinov2WithRegistersConfig

from .configuration_removal import RemovalConfigMixin


@strict
class LambdaDinov2WithRegistersConfig(RemovalConfigMixin, Dinov2WithRegistersConfig):
    r"""
    Configuration of a DINOv2 with registers in which some blocks have no attention.
    It takes all arguments of [`Dinov2WithRegistersConfig`] and [`RemovalConfigMixin`].
    """

    model_type = "lambda_dinov2_with_registers"
    source_model_types = ("dinov2_with_registers",)


LambdaDinov2WithRegistersConfig.register_for_auto_class()

__all__ = ["LambdaDinov2WithRegistersConfig"]
