"""Loading an image classifier, or an encoder, that is to be measured or served: whole, or not at all."""

import torch
from transformers import AutoModelForImageClassification, PreTrainedModel

from ..models.families import AutoLambdaModel, AutoLambdaModelForImageClassification, read_config_dict


def load_classifier(
    name_or_path: str, dtype: torch.dtype = torch.float32, model_class: type = AutoModelForImageClassification
) -> PreTrainedModel:
    """
    An image classifier of the Hub or a folder, in eval mode.

    Args:
        name_or_path (`str`): Hub id or folder.
        dtype (`torch.dtype`, *optional*, defaults to `torch.float32`): of its weights.
        model_class (`type`, *optional*, defaults to `AutoModelForImageClassification`): what loads it.

    Raises:
        OSError: if there is no such checkpoint.
        ValueError: if a weight is missing from the checkpoint or has another shape, such as those of a class head
            that was never trained: it would be random.
    """
    read_config_dict(name_or_path)
    # Mismatches are listed instead of raised, to name them below.
    model, info = model_class.from_pretrained(
        name_or_path, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True
    )
    random = sorted(info["missing_keys"]) + sorted(str(key) for key in info["mismatched_keys"])
    if random:
        raise ValueError(
            f"{name_or_path} lacks {len(random)} weights, which would be random: {random[:5]}. Train it first."
        )
    if getattr(model, "newly_initialized_head", False):
        raise ValueError(
            f"The class head of {name_or_path} was saved before any training: it is random. Train it first."
        )
    return model.eval()


def is_encoder(name_or_path: str) -> bool:
    """Whether a checkpoint's config names a class `...Model`, which has no class head."""
    return (read_config_dict(name_or_path).get("architectures") or [""])[0].endswith("Model")


def load_encoder(name_or_path: str, **options) -> PreTrainedModel:
    """
    A Lambda model of any family without class head, in eval mode; a pooler that is not in the checkpoint is left out:
    it would be random. Options are those of [`AutoLambdaModel.from_pretrained`], which says what is raised.
    """
    model, info = AutoLambdaModel.from_pretrained(name_or_path, output_loading_info=True, **options)
    if any(key.startswith("pooler.") for key in info["missing_keys"]):
        model.pooler = None
    return model


def load_classifier_or_encoder(name_or_path: str) -> PreTrainedModel:
    """
    A Lambda model of any family, in eval mode, float32: an encoder where the checkpoint's config names a class
    `...Model`, else a classifier. Raises as [`load_encoder`] or [`load_classifier`].
    """
    if is_encoder(name_or_path):
        return load_encoder(name_or_path, dtype=torch.float32)
    return load_classifier(name_or_path, model_class=AutoLambdaModelForImageClassification)
