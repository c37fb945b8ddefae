"""Which class takes which checkpoint: every family by the `model_type` of transformers and by its own.

This file does not travel with saved models: it knows all families.
"""

from importlib import import_module
from pathlib import Path

from huggingface_hub.errors import HFValidationError
from transformers import (
    CONFIG_MAPPING,
    AutoBackbone,
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForMaskedImageModeling,
    PreTrainedConfig,
)
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING

from .checksums import check_checksums


# By transformers' `model_type`: the module's ending, and how the family's classes begin. A model of images and texts
# gives its vision tower.
FAMILIES = {
    "vit": ("vit", "LambdaViT"),
    "deit": ("deit", "LambdaDeiT"),
    "dinov2": ("dinov2", "LambdaDinov2"),
    "dinov2_with_registers": ("dinov2_with_registers", "LambdaDinov2WithRegisters"),
    "dinov3_vit": ("dinov3_vit", "LambdaDINOv3ViT"),
    "siglip_vision_model": ("siglip_vision", "LambdaSiglipVision"),
    "siglip": ("siglip_vision", "LambdaSiglipVision"),
    "clip_vision_model": ("clip_vision", "LambdaCLIPVision"),
    "clip": ("clip_vision", "LambdaCLIPVision"),
}
_OWN = {f"lambda_{ending}": (ending, beginning) for ending, beginning in FAMILIES.values()}


def family_class(model_type: str, kind: str) -> type:
    """
    A class of the family that reads checkpoints of a `model_type`.

    Args:
        model_type (`str`): transformers', such as `"dinov2"`, or a family's own, such as `"lambda_dinov2"`.
        kind (`str`): how its name ends: `"Config"`, `"Model"`, `"ForImageClassification"`, `"Backbone"`.

    Raises:
        ValueError: if no family reads such checkpoints, or the family has no such class.
    """
    known = {**FAMILIES, **_OWN}
    if model_type not in known:
        raise ValueError(
            f"No family here reads `{model_type}` checkpoints; supported are"
            f" {', '.join(f'`{name}`' for name in FAMILIES)}, and what was saved from them."
        )
    ending, beginning = known[model_type]
    part = "configuration" if kind == "Config" else "modeling"
    module = import_module(f".{part}_lambda_{ending}", __package__)
    if not hasattr(module, beginning + kind):
        raise ValueError(f"There is no {beginning}{kind}: transformers has none for `{model_type}`.")
    return getattr(module, beginning + kind)


def load_as_saved(folder: str | Path):
    """
    A saved model, as the class that its config names.

    Raises:
        OSError: if there is no model; ValueError: if it is of no family; what the class's `from_pretrained` raises.
    """
    config = read_config_dict(folder)
    model_type, architecture = config["model_type"], (config.get("architectures") or ["Model"])[0]
    beginning = {**FAMILIES, **_OWN}.get(model_type, ("", ""))[1]
    return family_class(model_type, architecture.removeprefix(beginning)).from_pretrained(folder)


def register_auto_classes() -> None:
    """Let transformers' Auto classes and pipelines open what the families save."""
    entries = {
        "Backbone": AutoBackbone,
        "Model": AutoModel,
        "ForImageClassification": AutoModelForImageClassification,
        "ForMaskedImageModeling": AutoModelForMaskedImageModeling,
    }
    for ending, beginning in dict(FAMILIES.values()).items():
        config = family_class(f"lambda_{ending}", "Config")
        AutoConfig.register(config.model_type, config, exist_ok=True)
        modeling = import_module(f".modeling_lambda_{ending}", __package__)
        for kind, auto_class in entries.items():
            if hasattr(modeling, beginning + kind):
                auto_class.register(config, getattr(modeling, beginning + kind), exist_ok=True)
        source = CONFIG_MAPPING[config.source_model_types[-1]]
        if source in IMAGE_PROCESSOR_MAPPING:  # else the checkpoint's own preprocessor_config.json names the class
            processors = IMAGE_PROCESSOR_MAPPING[source]
            AutoImageProcessor.register(config, image_processor_classes=processors, exist_ok=True)
    # A DeiT with both heads is opened by the architecture that its config names.
    deit = import_module(".modeling_lambda_deit", __package__)
    classes = (deit.LambdaDeiTForImageClassification, deit.LambdaDeiTForImageClassificationWithTeacher)
    AutoModelForImageClassification._model_mapping.register(deit.LambdaDeiTConfig, classes, exist_ok=True)


def read_config_dict(name_or_path: str | Path, **of_hub) -> dict:
    """
    What a checkpoint's config.json says.

    Raises:
        OSError: if there is none, naming the checkpoint, which transformers' own message does not always; if it is a
            file.
    """
    if Path(name_or_path).is_file():
        raise NotADirectoryError(f"{name_or_path} is a file: name the folder that holds it.")
    try:
        config, _ = PreTrainedConfig.get_config_dict(name_or_path, **of_hub)
    except HFValidationError as error:
        raise OSError(f"There is no folder {name_or_path}, and it is no id of the Hub either.") from error
    except OSError as error:
        raise OSError(
            f"{name_or_path} is no folder with a model, nor could it be had from the Hub: {error}"
        ) from error
    if "model_type" not in config:
        raise OSError(f"{name_or_path} is no model: it has no config.json with a `model_type`.")
    return config


class _AutoLambdaModel:
    """`from_pretrained` of whichever family a checkpoint is of."""

    _kind: str

    def __init__(self):
        raise OSError(f"{type(self).__name__} is made by `{type(self).__name__}.from_pretrained(...)`.")

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, **kwargs):
        """
        Load a checkpoint of transformers or of this package.

        Args:
            pretrained_model_name_or_path (`str` or `Path`): Hub id or folder.
            kwargs: as of the family's class, e.g. [`LambdaViTForImageClassification`].

        Raises:
            ValueError: if no family reads it; what the family's class raises.
        """
        model_class = cls.class_for(pretrained_model_name_or_path, **kwargs)
        return model_class.from_pretrained(pretrained_model_name_or_path, *model_args, **kwargs)

    @classmethod
    def class_for(cls, pretrained_model_name_or_path, **kwargs) -> type:
        """The family's class that `from_pretrained` would load with."""
        names = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")
        # All files are compared when the class loads them; this one is read before.
        folder = Path(pretrained_model_name_or_path, kwargs.get("subfolder") or "")
        check_checksums(folder, is_complete=False, names=["config.json"])
        of_hub = {name: kwargs[name] for name in names if name in kwargs}
        config = read_config_dict(pretrained_model_name_or_path, **of_hub)
        model_class = family_class(config["model_type"], cls._kind)
        # A DeiT with both heads is a class of its own.
        architecture = (config.get("architectures") or [""])[0].removeprefix("Lambda")
        if cls._kind == "ForImageClassification" and architecture.endswith("ForImageClassificationWithTeacher"):
            model_class = family_class(config["model_type"], "ForImageClassificationWithTeacher")
        return model_class


class AutoLambdaModel(_AutoLambdaModel):
    """
    The bare Lambda model of whichever family a checkpoint is of.

    Example:

    ```python
    from lambda_vit_hf import AutoLambdaModel

    model = AutoLambdaModel.from_pretrained("facebook/dinov2-small")  # a LambdaDinov2Model
    ```
    """

    _kind = "Model"


class AutoLambdaModelForImageClassification(_AutoLambdaModel):
    """
    The Lambda image classifier of whichever family a checkpoint is of; without a head in it, one is drawn at random.

    Example:

    ```python
    from lambda_vit_hf import AutoLambdaModelForImageClassification

    model = AutoLambdaModelForImageClassification.from_pretrained("facebook/dinov2-small", num_labels=10)
    ```
    """

    _kind = "ForImageClassification"


__all__ = ["FAMILIES", "AutoLambdaModel", "AutoLambdaModelForImageClassification", "family_class"]
