"""LambdaSiglipVision configuration: SiglipVisionConfig, and which attention layers exist."""

from huggingface_hub.dataclasses import strict
from transformers import SiglipVisionConfig

from .configuration_removal import RemovalConfigMixin


@strict
class LambdaSiglipVisionConfig(RemovalConfigMixin, SiglipVisionConfig):
    r"""
    Configuration of a SigLIP vision tower (SigLIP 2 of fixed resolution, too) in which some blocks have no attention.
    It takes all arguments of [`SiglipVisionConfig`] and [`RemovalConfigMixin`].
    """

    model_type = "lambda_siglip_vision"
    source_model_types = ("siglip_vision_model", "siglip")


LambdaSiglipVisionConfig.register_for_auto_class()

__all__ = ["LambdaSiglipVisionConfig"]
