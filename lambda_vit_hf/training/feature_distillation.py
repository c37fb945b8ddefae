"""Training without labels: the features of an encoder stay near those of the whole one."""

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from transformers.modeling_outputs import ModelOutput

from ..data.dataset import LEFT_OUT
from ..models.pretrained_model import LambdaPreTrainedModel
from ..selection.checks import check_is_ours
from .losses import frozen_copy
from .trainer import ImageTrainer


class FeatureDistillationLoss:
    """
    How far the features of an encoder are from a teacher's, here the encoder as it was, with all its attention:
    `1 - (cos(image) + mean over patches of cos(patch)) / 2`, mean over images; cosines to the teacher's vectors.

    The features are those behind the last LayerNorm: the class token (SigLIP: what it pools), and the patch tokens.
    Registers and distillation tokens are left out. Labels are not needed.

    The teacher is copied (so the model that will be trained may be given), put into evaluation mode, and never
    trained; it computes all tokens, also where the model merges some. It is no part of the model, nor of checkpoints.

    Args:
        teacher ([`LambdaPreTrainedModel`]): an encoder without head, such as [`LambdaDinov2Model`].

    Raises:
        ValueError: if the teacher is of no Lambda family, has a head, or is a backbone.

    Source: cosine distance to the features of a teacher, as in EVA (arXiv 2211.07636) and AM-RADIO (arXiv 2312.06709).
    It differs from [`~lambda_vit_hf.training.losses.DistillationLoss`], which compares logits of classes.

    Example, in the `compute_loss` of a plain `Trainer`; [`FeatureDistillationTrainer`] has more:

    ```python
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(inputs["pixel_values"])
        loss = self.distillation(self.accelerator.unwrap_model(model), outputs, inputs["pixel_values"])
        return (loss, outputs) if return_outputs else loss
    ```
    """

    def __init__(self, teacher: LambdaPreTrainedModel):
        check_is_encoder(teacher)
        self.teacher = frozen_copy(teacher)

    def __call__(self, student: LambdaPreTrainedModel, outputs: ModelOutput, pixel_values: torch.Tensor):
        """
        Args:
            student ([`LambdaPreTrainedModel`]): the encoder in training, unwrapped.
            outputs (`ModelOutput`): what it gave, with `last_hidden_state` `(batch, tokens, hidden)`.
            pixel_values (`torch.Tensor`): what it saw, `(batch, channels, height, width)`.

        Returns:
            `torch.Tensor`: a scalar, in [0, 2].
        """
        return distance(self.cosines(student, outputs, pixel_values)).mean()

    def cosines(self, student: LambdaPreTrainedModel, outputs: ModelOutput, pixel_values: torch.Tensor):
        """
        Cosines to the teacher's features, of each image: of its vector, and the mean of its patches', `(batch, 2)`.

        Raises:
            ValueError: if student and teacher differ in the number or width of their tokens; if one merges tokens and
                gives no feature of each patch (ViT, DeiT).
        """
        theirs = self._teacher_features(pixel_values)
        ours = student.image_and_patch_features(outputs.last_hidden_state)
        if ours[1].shape != theirs[1].shape:
            raise ValueError(
                f"The student's patch features have shape {tuple(ours[1].shape)}, the teacher's"
                f" {tuple(theirs[1].shape)}: a teacher of the same patches and width is needed."
            )
        image, patches = (
            functional.cosine_similarity(one.float(), other.float(), dim=-1)
            for one, other in zip(ours, theirs, strict=True)
        )
        return torch.stack([image, patches.mean(dim=1)], dim=1)

    @torch.no_grad()
    def _teacher_features(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self.teacher.device != pixel_values.device:
            self.teacher.to(pixel_values.device)
        outputs = self.teacher(pixel_values.to(self.teacher.dtype))
        return self.teacher.image_and_patch_features(outputs.last_hidden_state)


def distance(cosines: torch.Tensor) -> torch.Tensor:
    """The loss of each image, `(batch,)`, from its cosines, `(batch, 2)`."""
    return 1 - cosines.mean(dim=1)


def check_is_encoder(model: nn.Module) -> None:
    """
    Raises:
        ValueError: if it is not a bare model of a Lambda family, whose output is `last_hidden_state`.
    """
    check_is_ours(model)
    if model.base_model is not model or model._final_norm is None:
        encoder = "load it with AutoLambdaModel" if model.base_model is model else "pass `model.base_model`"
        raise ValueError(
            f"Features are compared of an encoder such as LambdaDinov2Model, got {type(model).__name__}: {encoder}."
        )


class FeatureDistillationTrainer(ImageTrainer):
    """
    A [`Trainer`] that needs images only: the features of an encoder stay near those of the encoder it was. With
    [`EntropyGuidedRemovalCallback`] what comes out is the same encoder with less attention.

    Items of the datasets are dicts with `pixel_values`. Labels are not read, but that images labelled -100 count in no
    evaluation. An evaluation gives the cosines to the teacher's features, means over the images: `image_cosine` of the
    images' vectors, `patch_cosine` of their patches'.

    Differences from `ImageTrainer`: the loss is a [`FeatureDistillationLoss`], and evaluation its cosines.

    Args:
        teacher ([`LambdaPreTrainedModel`], *optional*): by default the model as it is given, without token merging.
        kwargs: everything [`Trainer`] takes; `compute_metrics` defaults to those above.

    Raises:
        ValueError: as of [`FeatureDistillationLoss`].

    Example:

    ```python
    from transformers import TrainingArguments
    from lambda_vit_hf import AutoLambdaModel, EntropyGuidedRemovalCallback, FeatureDistillationTrainer

    trainer = FeatureDistillationTrainer(
        model=AutoLambdaModel.from_pretrained("facebook/dinov2-small"),
        args=TrainingArguments("outputs/smaller", num_train_epochs=10),
        train_dataset=images,  # of items {"pixel_values": (channels, height, width)}
        callbacks=[EntropyGuidedRemovalCallback(num_removed_layers=4)],
    )
    trainer.train()
    trainer.save_model()  # AutoModel loads it
    ```
    """

    def __init__(self, *args, teacher: LambdaPreTrainedModel | None = None, **kwargs):
        kwargs.setdefault("compute_metrics", feature_metrics)
        super().__init__(*args, **kwargs)
        check_is_encoder(self.model)
        self.model.check_gives_patch_features()
        self.distillation = FeatureDistillationLoss(self.model if teacher is None else teacher)

    def compute_loss(self, model, inputs, return_outputs: bool = False, num_items_in_batch=None):
        outputs, cosines = self._forward(model, inputs["pixel_values"])
        loss = distance(cosines).sum() / self.images_of_loss(self._labels(inputs), num_items_in_batch)
        return (loss, outputs) if return_outputs else loss

    def prediction_step(self, model, inputs, prediction_loss_only: bool, ignore_keys=None):
        inputs = self._prepare_inputs(inputs)
        labels = self._labels(inputs)
        with torch.no_grad():
            _, cosines = self._forward(model, inputs["pixel_values"])
        counts = labels != LEFT_OUT
        loss = (distance(cosines) * counts).sum() / counts.sum().clamp(min=1)
        return (loss, None, None) if prediction_loss_only else (loss, cosines, labels)

    def _forward(self, model, pixel_values: torch.Tensor) -> tuple[ModelOutput, torch.Tensor]:
        outputs = model(pixel_values)
        with self.accelerator.autocast():  # which accelerate has put around the student's forward only
            return outputs, self.distillation.cosines(self.accelerator.unwrap_model(model), outputs, pixel_values)

    def _labels(self, inputs: dict) -> torch.Tensor:
        """Those of the batch, or 0: only whether an image counts is read."""
        labels, pixel_values = inputs.get("labels"), inputs["pixel_values"]
        return (
            torch.zeros(len(pixel_values), dtype=torch.long, device=pixel_values.device) if labels is None else labels
        )


def feature_metrics(prediction) -> dict[str, float]:
    """
    `compute_metrics` of [`FeatureDistillationTrainer`]; images labelled -100, that is, unreadable ones, are left out.

    Raises:
        ValueError: if no image is left.
    """
    counts = np.asarray(prediction.label_ids) != LEFT_OUT
    if not counts.any():
        raise ValueError("No image of the evaluation set could be read: there are no features to compare.")
    image, patches = np.asarray(prediction.predictions)[counts].mean(axis=0).tolist()
    return {"image_cosine": image, "patch_cosine": patches}
