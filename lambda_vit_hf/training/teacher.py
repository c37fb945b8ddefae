"""The classifier that a training distils from, where it is not the model before removal."""

import torch
from torch import nn
from transformers import AutoImageProcessor

from ..data.augmentation import output_size
from ..evaluation.classifier import load_classifier
from ..models.problem_type import SINGLE_LABEL, problem_type_of


def load_teacher(name_or_path: str, model: nn.Module, image_processor) -> nn.Module:
    """
    A classifier of any family that has the student's classes, in its order, and takes the student's images.

    Args:
        name_or_path (`str`): Hub id or folder.
        model ([`LambdaPreTrainedModel`]): the student.
        image_processor: of the student.

    Raises:
        OSError: if there is no such checkpoint.
        ValueError: if a weight of it is missing, or it has other classes, or takes other images.
    """
    teacher = load_classifier(name_or_path)
    if problem_type_of(teacher.config) != SINGLE_LABEL:
        raise ValueError(
            f"The teacher {name_or_path} was trained for {problem_type_of(teacher.config).replace('_', ' ')}: its"
            " logits are no scores of one of several classes."
        )
    mine, theirs = model.config.id2label, teacher.config.id2label
    unnamed = {index: f"LABEL_{index}" for index in theirs}
    if len(mine) != len(theirs) or (mine != theirs and theirs != unnamed):
        raise ValueError(
            f"The teacher {name_or_path} has other classes than the dataset, or another order:"
            f" {list(theirs.values())[:5]} ({len(theirs)}), not {list(mine.values())[:5]} ({len(mine)})."
        )
    own = AutoImageProcessor.from_pretrained(name_or_path)
    for name in ("do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std"):
        given, wanted = (_plain(getattr(one, name, None)) for one in (image_processor, own))
        if given != wanted:
            raise ValueError(
                f"The teacher {name_or_path} takes images of {name} = {wanted}, the model of {given}, and both see the"
                " same."
            )
    height, width = output_size(image_processor)
    try:
        with torch.no_grad():
            teacher(torch.zeros(1, model.config.num_channels, height, width))
    except ValueError as error:
        raise ValueError(
            f"The teacher {name_or_path} does not take the model's images of {height} x {width} pixels: {error}"
        ) from error
    return teacher


def check_hidden_states(model: nn.Module, teacher: nn.Module | None = None) -> None:
    """
    Can what leaves the student's blocks be compared with the teacher's (by default itself, as it is before training)?

    Args:
        model ([`LambdaPreTrainedModel`]): the student.
        teacher (`nn.Module`, *optional*): another classifier.

    Raises:
        ValueError: if they differ in blocks or width, or the student merges tokens.
    """
    if any(model.config.token_merging_schedule()):
        raise ValueError(
            "--distillation_hidden_weight compares tokens one by one, but the model merges them: set it to 0, or"
            " --token_merging_r."
        )
    if teacher is None:
        return
    for name in ("num_hidden_layers", "hidden_size", "patch_size"):
        mine, theirs = getattr(model.config, name), getattr(teacher.config, name, None)
        if mine != theirs:
            raise ValueError(
                f"--distillation_hidden_weight needs a teacher of the model's shape ({name} is {theirs}, not {mine}):"
                " set it to 0."
            )


def _plain(value):
    return list(value) if isinstance(value, (list, tuple)) else value
