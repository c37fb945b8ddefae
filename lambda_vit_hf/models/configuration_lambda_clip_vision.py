"""LambdaCLIPVision configuration: CLIPVisionConfig, and which attention layers exist."""

from huggingface_hub.dataclasses import strict
from transformers import CLIPVisionConfig

from .configuration_removal import RemovalConfigMixin


@strict
class LambdaCLIPVisionConfig(RemovalConfigMixin, CLIPVisionConfig):
    r"""
    Configuration of a CLIP vision tower in which some blocks have no attention.
    It takes all arguments of [`CLIPVisionConfig`] and [`RemovalConfigMixin`].
    """

    model_type = "lambda_clip_vision"
    source_model_types = ("clip_vision_model", "clip")


LambdaCLIPVisionConfig.register_for_auto_class()

__all__ = ["LambdaCLIPVisionConfig"]
