"""LambdaDinov2 configuration: Dinov2Config, and which attention layers exist."""

from huggingface_hub.dataclasses import strict
from transformers import Dinov2Config

from .configuration_removal import RemovalConfigMixin


@strict
class LambdaDinov2Config(RemovalConfigMixin, Dinov2Config):
    r"""
    Configuration of a DINOv2 in which some blocks have no attention, only an MLP. It takes all arguments of
    [`Dinov2Config`] and [`RemovalConfigMixin`].

    Example:

    ```python
    >>> from lambda_vit_hf import LambdaDinov2Config

    >>> LambdaDinov2Config(num_hidden_layers=4, attention_flags=[True, False, True, True]).removed_layers
    [1]
    ```
    """

    model_type = "lambda_dinov2"
    source_model_types = (Dinov2Config.model_type,)


LambdaDinov2Config.register_for_auto_class()

__all__ = ["LambdaDinov2Config"]
