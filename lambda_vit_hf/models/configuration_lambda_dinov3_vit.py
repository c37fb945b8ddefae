"""LambdaDINOv3ViT configuration: DINOv3ViTConfig, and which attention layers exist."""

from huggingface_hub.dataclasses import strict
from transformers import DINOv3ViTConfig

from .configuration_removal import RemovalConfigMixin


@strict
class LambdaDINOv3ViTConfig(RemovalConfigMixin, DINOv3ViTConfig):
    r"""
    Configuration of a DINOv3 ViT in which some blocks have no attention.
    It takes all arguments of [`DINOv3ViTConfig`] and [`RemovalConfigMixin`].
    """

    model_type = "lambda_dinov3_vit"
    source_model_types = ("dinov3_vit",)


LambdaDINOv3ViTConfig.register_for_auto_class()

__all__ = ["LambdaDINOv3ViTConfig"]
