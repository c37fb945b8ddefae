"""Vision transformers with fewer attention layers, inside the Hugging Face ecosystem."""

import importlib

from transformers import (
    AutoBackbone,
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForMaskedImageModeling,
    ViTImageProcessor,
)

from .evaluation.accounting import summarize
from .models.configuration_lambda_vit import LambdaViTConfig
from .models.modeling_lambda_vit import (
    LambdaViTBackbone,
    LambdaViTForImageClassification,
    LambdaViTForMaskedImageModeling,
    LambdaViTModel,
)
from .selection.config import SelectionConfig
from .selection.select import AttentionSelection, select_attention_layers
from .training.checkpoints import find_resumable_checkpoint


__version__ = "0.1.0"

AutoConfig.register(LambdaViTConfig.model_type, LambdaViTConfig, exist_ok=True)
AutoBackbone.register(LambdaViTConfig, LambdaViTBackbone, exist_ok=True)
AutoModel.register(LambdaViTConfig, LambdaViTModel, exist_ok=True)
AutoModelForImageClassification.register(LambdaViTConfig, LambdaViTForImageClassification, exist_ok=True)
AutoModelForMaskedImageModeling.register(LambdaViTConfig, LambdaViTForMaskedImageModeling, exist_ok=True)
AutoImageProcessor.register(LambdaViTConfig, image_processor_classes={"torchvision": ViTImageProcessor}, exist_ok=True)

_TRAINING = {
    "EmaCallback": "training.ema",
    "EntropyGuidedRemovalCallback": "training.callback",
    "SaveOnSigterm": "training.guards",
    "StopOnNonFiniteGradient": "training.guards",
}


def __getattr__(name: str):
    # Imported when asked for: a served model needs nothing of the `train` extra.
    if name in _TRAINING:
        return getattr(importlib.import_module(f".{_TRAINING[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "AttentionSelection",
    "EmaCallback",
    "EntropyGuidedRemovalCallback",
    "LambdaViTBackbone",
    "LambdaViTConfig",
    "LambdaViTForImageClassification",
    "LambdaViTForMaskedImageModeling",
    "LambdaViTModel",
    "SaveOnSigterm",
    "SelectionConfig",
    "StopOnNonFiniteGradient",
    "find_resumable_checkpoint",
    "select_attention_layers",
    "summarize",
]
