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
    "AttentionRemoval": "training.removal",
    "DilutionConfig": "training.dilution",
    "EmaCallback": "training.ema",
    "EntropyGuidedRemovalCallback": "training.callback",
    "LambdaViTTrainer": "training.trainer_mixin",
    "LambdaViTTrainerMixin": "training.trainer_mixin",
    "SaveOnSigterm": "training.guards",
    "StopOnNonFiniteGradient": "training.guards",
    "finish_checkpoint": "training.finishing",
}


def __getattr__(name: str):
    # Imported when asked for: a served model needs nothing of the `train` extra.
    if name in _TRAINING:
        try:
            return getattr(importlib.import_module(f".{_TRAINING[name]}", __name__), name)
        except ImportError as error:
            raise ImportError(
                f'{name} needs what training needs: pip install "lambda-vit-hf[train]" ({error}).'
            ) from error
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "AttentionRemoval",
    "AttentionSelection",
    "DilutionConfig",
    "EmaCallback",
    "EntropyGuidedRemovalCallback",
    "LambdaViTBackbone",
    "LambdaViTConfig",
    "LambdaViTForImageClassification",
    "LambdaViTForMaskedImageModeling",
    "LambdaViTModel",
    "LambdaViTTrainer",
    "LambdaViTTrainerMixin",
    "SaveOnSigterm",
    "SelectionConfig",
    "StopOnNonFiniteGradient",
    "find_resumable_checkpoint",
    "finish_checkpoint",
    "select_attention_layers",
    "summarize",
]
