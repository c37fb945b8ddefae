"""Vision transformers with fewer attention layers, inside the Hugging Face ecosystem."""

import importlib
import importlib.metadata
from typing import TYPE_CHECKING

from .models.configuration_lambda_clip_vision import LambdaCLIPVisionConfig
from .models.configuration_lambda_deit import LambdaDeiTConfig
from .models.configuration_lambda_dinov2 import LambdaDinov2Config
from .models.configuration_lambda_dinov2_with_registers import LambdaDinov2WithRegistersConfig
from .models.configuration_lambda_dinov3_vit import LambdaDINOv3ViTConfig
from .models.configuration_lambda_siglip_vision import LambdaSiglipVisionConfig
from .models.configuration_lambda_vit import LambdaViTConfig
from .models.families import AutoLambdaModel, AutoLambdaModelForImageClassification, register_auto_classes
from .models.modeling_lambda_clip_vision import LambdaCLIPVisionForImageClassification, LambdaCLIPVisionModel
from .models.modeling_lambda_deit import (
    LambdaDeiTForImageClassification,
    LambdaDeiTForImageClassificationWithTeacher,
    LambdaDeiTModel,
)
from .models.modeling_lambda_dinov2 import LambdaDinov2Backbone, LambdaDinov2ForImageClassification, LambdaDinov2Model
from .models.modeling_lambda_dinov2_with_registers import (
    LambdaDinov2WithRegistersBackbone,
    LambdaDinov2WithRegistersForImageClassification,
    LambdaDinov2WithRegistersModel,
)
from .models.modeling_lambda_dinov3_vit import (
    LambdaDINOv3ViTBackbone,
    LambdaDINOv3ViTForImageClassification,
    LambdaDINOv3ViTModel,
)
from .models.modeling_lambda_siglip_vision import LambdaSiglipVisionForImageClassification, LambdaSiglipVisionModel
from .models.modeling_lambda_vit import (
    LambdaViTBackbone,
    LambdaViTForImageClassification,
    LambdaViTForMaskedImageModeling,
    LambdaViTModel,
)


if TYPE_CHECKING:
    from .evaluation.accounting import summarize
    from .evaluation.removal_curve import removal_curve
    from .selection.config import SelectionConfig
    from .selection.linear_maps import fit_linear_maps
    from .selection.select import AttentionSelection, select_attention_layers
    from .training.callback import EntropyGuidedRemovalCallback
    from .training.checkpoints import find_resumable_checkpoint
    from .training.dilution import DilutionConfig
    from .training.ema import EmaCallback
    from .training.feature_distillation import FeatureDistillationTrainer
    from .training.finishing import finish_checkpoint
    from .training.guards import SaveOnSigterm, StopOnNonFiniteGradient
    from .training.removal import AttentionRemoval
    from .training.trainer_mixin import LambdaViTTrainer, LambdaViTTrainerMixin

    __version__: str

register_auto_classes()

# Imported when first used: a served model needs nothing of the extra `train`. The same names as above.
_LAZY = {
    "AttentionRemoval": "training.removal",
    "AttentionSelection": "selection.select",
    "DilutionConfig": "training.dilution",
    "EmaCallback": "training.ema",
    "EntropyGuidedRemovalCallback": "training.callback",
    "FeatureDistillationTrainer": "training.feature_distillation",
    "LambdaViTTrainer": "training.trainer_mixin",
    "LambdaViTTrainerMixin": "training.trainer_mixin",
    "SaveOnSigterm": "training.guards",
    "SelectionConfig": "selection.config",
    "StopOnNonFiniteGradient": "training.guards",
    "find_resumable_checkpoint": "training.checkpoints",
    "finish_checkpoint": "training.finishing",
    "fit_linear_maps": "selection.linear_maps",
    "removal_curve": "evaluation.removal_curve",
    "select_attention_layers": "selection.select",
    "summarize": "evaluation.accounting",
}

__all__ = [
    "AttentionRemoval",
    "AttentionSelection",
    "AutoLambdaModel",
    "AutoLambdaModelForImageClassification",
    "DilutionConfig",
    "EmaCallback",
    "EntropyGuidedRemovalCallback",
    "FeatureDistillationTrainer",
    "LambdaCLIPVisionConfig",
    "LambdaCLIPVisionForImageClassification",
    "LambdaCLIPVisionModel",
    "LambdaDINOv3ViTBackbone",
    "LambdaDINOv3ViTConfig",
    "LambdaDINOv3ViTForImageClassification",
    "LambdaDINOv3ViTModel",
    "LambdaDeiTConfig",
    "LambdaDeiTForImageClassification",
    "LambdaDeiTForImageClassificationWithTeacher",
    "LambdaDeiTModel",
    "LambdaDinov2Backbone",
    "LambdaDinov2Config",
    "LambdaDinov2ForImageClassification",
    "LambdaDinov2Model",
    "LambdaDinov2WithRegistersBackbone",
    "LambdaDinov2WithRegistersConfig",
    "LambdaDinov2WithRegistersForImageClassification",
    "LambdaDinov2WithRegistersModel",
    "LambdaSiglipVisionConfig",
    "LambdaSiglipVisionForImageClassification",
    "LambdaSiglipVisionModel",
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
    "fit_linear_maps",
    "removal_curve",
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
        except ModuleNotFoundError as error:
            raise ImportError(
                f"{name} needs what the extra `train` installs: pip install 'lambda-vit-hf[train]'. ({error})"
            ) from error
        return getattr(module, name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
