"""Vision transformers with fewer attention layers, inside the Hugging Face ecosystem."""

import importlib
import importlib.metadata
from typing import TYPE_CHECKING

from transformers import (
    AutoBackbone,
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForMaskedImageModeling,
    ViTImageProcessor,
)

from .models.configuration_lambda_vit import LambdaViTConfig
from .models.modeling_lambda_vit import (
    LambdaViTBackbone,
    LambdaViTForImageClassification,
    LambdaViTForMaskedImageModeling,
    LambdaViTModel,
)


if TYPE_CHECKING:
    from .evaluation.accounting import summarize
    from .selection.select import AttentionSelection, select_attention_layers
    from .training.callback import EntropyGuidedRemovalCallback
    from .training.checkpoints import find_resumable_checkpoint
    from .training.ema import EmaCallback
    from .training.guards import SaveOnSigterm, StopOnNonFiniteGradient

    __version__: str

AutoConfig.register(LambdaViTConfig.model_type, LambdaViTConfig, exist_ok=True)
AutoBackbone.register(LambdaViTConfig, LambdaViTBackbone, exist_ok=True)
AutoModel.register(LambdaViTConfig, LambdaViTModel, exist_ok=True)
AutoModelForImageClassification.register(LambdaViTConfig, LambdaViTForImageClassification, exist_ok=True)
AutoModelForMaskedImageModeling.register(LambdaViTConfig, LambdaViTForMaskedImageModeling, exist_ok=True)
AutoImageProcessor.register(LambdaViTConfig, image_processor_classes={"torchvision": ViTImageProcessor}, exist_ok=True)

# Imported when first used: a served model needs nothing of the extra `train`. The same names as above.
_LAZY = {
    "AttentionSelection": "selection.select",
    "EmaCallback": "training.ema",
    "EntropyGuidedRemovalCallback": "training.callback",
    "SaveOnSigterm": "training.guards",
    "StopOnNonFiniteGradient": "training.guards",
    "find_resumable_checkpoint": "training.checkpoints",
    "select_attention_layers": "selection.select",
    "summarize": "evaluation.accounting",
}

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
    "StopOnNonFiniteGradient",
    "find_resumable_checkpoint",
    "select_attention_layers",
    "summarize",
]


if not TYPE_CHECKING:  # a type checker would take every name for one of the package's

    def __getattr__(name: str):
        if name == "__version__":
            return importlib.metadata.version("lambda-vit-hf")
        if name not in _LAZY:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        try:
            module = importlib.import_module(f".{_LAZY[name]}", __name__)
        except ImportError as error:
            raise ImportError(
                f"{name} needs what the extra `train` installs: pip install 'lambda-vit-hf[train]'. ({error})"
            ) from error
        return getattr(module, name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
