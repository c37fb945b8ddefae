"""What the training program trains a model for: which images it needs, which loss, which figures tell how it went."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..evaluation.metrics import classification_metrics
from .arguments import AugmentationArguments, DataArguments, LambdaTrainingArguments, ModelArguments
from .feature_distillation import FeatureDistillationTrainer, feature_metrics
from .losses import DistillationLoss
from .reporting import classify_one, open_encoder
from .trainer import ImageClassificationTrainer, ImageTrainer


@dataclass(frozen=True)
class Task:
    """
    What differs between the tasks of the program.

    Attributes:
        is_labelled: whether the images need labels, and the model a class head.
        trainer_class: with the loss.
        compute_metrics: the Trainer's.
        scores: names in `metrics.json`, and of the same figures in the Trainer's evaluation; the first one is drawn.
        check: raises a ValueError where arguments do not fit the task.
        teach: called with the trainer, the whole model or another teacher, and the arguments before training.
        show: called with the finished folder and the validation images.
        scores_of_whole: of the model before removal, where they need not be measured.
        objective: for the card, where it is not the classes: how attention faded.
    """

    is_labelled: bool
    trainer_class: type[ImageTrainer]
    compute_metrics: Callable
    scores: dict[str, str]
    check: Callable[[ModelArguments, DataArguments, AugmentationArguments, LambdaTrainingArguments], None]
    teach: Callable
    show: Callable
    scores_of_whole: dict[str, float] | None = None
    objective: str | None = None


def find_task(name: str) -> Task:
    """
    Raises:
        ValueError: if there is no such task; names the known ones.
    """
    if name not in TASKS:
        raise ValueError(f"There is no task {name!r}: give one of {', '.join(TASKS)}.")
    return TASKS[name]


def _distillation(teacher: torch.nn.Module, training_args: LambdaTrainingArguments) -> DistillationLoss | None:
    if training_args.distillation == "none":
        return None
    return DistillationLoss(
        teacher,
        alpha=training_args.distillation_alpha,
        temperature=training_args.distillation_temperature,
        kind=training_args.distillation,
        hidden_weight=training_args.distillation_hidden_weight,
    )


def _check_classification(model_args, data_args, augmentation_args, training_args) -> None:
    _distillation(torch.nn.Identity(), training_args)
    if training_args.teacher_model_name_or_path is not None and training_args.distillation == "none":
        raise ValueError("--teacher_model_name_or_path needs --distillation soft or hard.")


def _teach_classes(trainer: ImageClassificationTrainer, whole, training_args: LambdaTrainingArguments) -> None:
    trainer.distillation = _distillation(whole, training_args)


def _check_feature_distillation(model_args, data_args, augmentation_args, training_args) -> None:
    if model_args.model_name_or_path is None:
        raise ValueError(
            "--task feature_distillation keeps the features of a trained encoder: name it by --model_name_or_path."
        )
    given = {
        "class_names": data_args.class_names,
        "label_column": data_args.label_column,
        "mixup": augmentation_args.mixup,
        "cutmix": augmentation_args.cutmix,
        "label_smoothing_factor": training_args.label_smoothing_factor,
        "distillation": training_args.distillation != "none",
        "teacher_model_name_or_path": training_args.teacher_model_name_or_path is not None,
    }
    if wrong := [name for name, value in given.items() if value]:
        raise ValueError(f"--task feature_distillation reads no labels, which {wrong} are about: leave these out.")


TASKS = {
    "image_classification": Task(
        is_labelled=True,
        trainer_class=ImageClassificationTrainer,
        compute_metrics=classification_metrics,
        scores={"top1": "accuracy"},
        check=_check_classification,
        teach=_teach_classes,
        show=classify_one,
    ),
    "feature_distillation": Task(
        is_labelled=False,
        trainer_class=FeatureDistillationTrainer,
        compute_metrics=feature_metrics,
        scores={"image_cosine": "image_cosine", "patch_cosine": "patch_cosine"},
        check=_check_feature_distillation,
        teach=lambda trainer, whole, training_args: None,  # the trainer's teacher is the whole encoder already
        show=open_encoder,
        scores_of_whole={"image_cosine": 1.0, "patch_cosine": 1.0},  # to itself
        objective="while its features were kept near those of the whole encoder, on images without labels",
    ),
}
