"""Losses of the DeiT recipe for the Hugging Face Trainer: hard or soft labels, and distillation from a teacher."""

import copy
import math
from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional

from ..models.pretrained_model import LambdaPreTrainedModel


DISTILLATION_KINDS = ("soft", "hard")


def images_averaged_over(labels: torch.Tensor, num_items_in_batch=None) -> torch.Tensor | float:
    """
    How many images a loss is the mean of.

    Args:
        labels (`torch.Tensor`): `(batch,)` integers, -100 for images without label, or `(batch, classes)` shares.
        num_items_in_batch (`int` or `torch.Tensor`, *optional*):
            As the `Trainer` counts: label *elements* other than -100, of all batches of an optimizer step, on all
            processes with `average_tokens_across_devices`. So soft labels count once per class. `None`: this batch.

    Returns:
        Number of images, at least 1.
    """
    if num_items_in_batch is None:
        num_items_in_batch = labels.ne(-100).sum()
    # Under nn.DataParallel the Trainer repeats the number for each GPU, and multiplies the loss by the GPUs.
    num_items = torch.as_tensor(num_items_in_batch, dtype=torch.float64, device=labels.device).sum()
    return (num_items / (labels.shape[1] if labels.ndim == 2 else 1)).clamp(min=1.0)


class ClassificationLoss:
    """
    Cross-entropy with hard or soft labels, for `Trainer(compute_loss_func=...)`.

    With such a function the Trainer no longer divides by the accumulation steps: the loss is the sum over the images
    of a batch, divided by all images of the optimizer step. So accumulated gradients are those of one large batch,
    also where the last batch is smaller.

    - Hard labels, `(batch,)` integers: -100 is ignored. `label_smoothing` counts in training only, as in DeiT; the
      loss of an evaluation is plain cross-entropy.
    - Soft labels, `(batch, classes)`, of mixup and cutmix: `sum over classes of -label * log softmax(logits)`. They
      are smoothed already (see [`MixupCollator`]), so `label_smoothing` is not applied again.

    Args:
        label_smoothing (`float`, *optional*, defaults to 0.0): share of a hard label spread over all classes, [0, 1).

    Raises:
        ValueError: if `label_smoothing` is outside [0, 1), or if there are no labels or labels of another shape.

    Source: `timm.loss.LabelSmoothingCrossEntropy` and `timm.loss.SoftTargetCrossEntropy`.
    """

    def __init__(self, label_smoothing: float = 0.0):
        if not 0.0 <= label_smoothing < 1.0:
            raise ValueError(f"`label_smoothing` must be in [0, 1), got {label_smoothing}.")
        self.label_smoothing = label_smoothing

    def __call__(self, outputs, labels: torch.Tensor | None, num_items_in_batch=None) -> torch.Tensor:
        logits = outputs["logits"] if isinstance(outputs, dict) else outputs[0]
        if labels is None:
            raise ValueError("The loss needs `labels`, but the batch has none. Do all items carry the key `labels`?")
        if labels.shape not in (logits.shape[:1], logits.shape):
            raise ValueError(
                f"Labels of shape {tuple(labels.shape)} do not fit logits of shape {tuple(logits.shape)}: expected"
                " (batch,) or (batch, classes)."
            )
        logits = _in_full_precision(logits)
        if labels.ndim == 2:
            total = functional.cross_entropy(logits, labels.to(logits.dtype), reduction="sum")
        else:
            smoothing = self.label_smoothing if logits.requires_grad else 0.0
            total = functional.cross_entropy(logits, labels, label_smoothing=smoothing, reduction="sum")
        return total / images_averaged_over(labels, num_items_in_batch).to(total.dtype)


class DistillationLoss:
    """
    Adds to a loss how far the student is from a teacher, here the unpruned model:
    `(1 - alpha) * base_loss + alpha * distance`.

    - `"soft"`: `temperature**2 * KL(softmax(teacher / temperature) || softmax(student / temperature))`, summed over
      classes, mean over images, as in the DeiT paper (equation 2) and timm. DeiT's code divides by the number of
      classes besides.
    - `"hard"`: cross-entropy with the teacher's top class as label (DeiT paper, equation 3).
    - With `hidden_weight`, also what leaves each block stays near what leaves the teacher's: that weight times
      `1 - cosine`, mean over blocks and tokens, joins either distance. The size of a token does not count, so a stream
      that is doubled where attention fades to the identity is as near as one that is not.

    The teacher is copied (so the model that will be trained may be given), put into evaluation mode, and never
    trained; it computes all tokens, also where it would merge some. It is no part of the model, nor of checkpoints.
    In evaluation, where logits carry no gradient, only the base loss is returned and the teacher does not run.

    Args:
        teacher (`nn.Module`): classifier whose outputs have `logits` `(batch, classes)`, of the student's classes.
        alpha (`float`, *optional*, defaults to 0.5): share of the distance, in [0, 1].
        temperature (`float`, *optional*, defaults to 1.0): softens both distributions (`"soft"` only), above 0.
        kind (`str`, *optional*, defaults to `"soft"`): `"soft"` or `"hard"`.
        hidden_weight (`float`, *optional*, defaults to 0.0): of what leaves the blocks, 0 or more. Call the model with
            `output_hidden_states=True` then.

    Raises:
        ValueError: if an argument is out of its range; when called, if teacher and student differ in classes, or in
            blocks, tokens or width where hidden states are compared.

    Source: Touvron et al., DeiT (arXiv 2012.12877), section 4; `timm.task.LogitDistillationTask`. Hidden states: layer
    by layer as in TinyBERT (arXiv 1909.10351), by cosine as in DistilBERT (arXiv 1910.01108).

    Example, in a `Trainer` with a [`ClassificationLoss`]:

    ```python
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        images = images_averaged_over(inputs["labels"], num_items_in_batch)
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            images = images / self.accelerator.num_processes  # DDP takes the mean of the processes' gradients
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        with self.accelerator.autocast():  # so that the teacher computes as the student does
            loss = self.distillation(inputs["pixel_values"], outputs.logits, loss, images)
        return (loss, outputs) if return_outputs else loss
    ```
    """

    def __init__(
        self,
        teacher: nn.Module,
        alpha: float = 0.5,
        temperature: float = 1.0,
        kind: str = "soft",
        hidden_weight: float = 0.0,
    ):
        if not 0.0 <= alpha <= 1.0:
            raise ValueError(f"`alpha` must be in [0, 1], got {alpha}.")
        if not temperature > 0.0:
            raise ValueError(f"`temperature` must be above 0, got {temperature}.")
        if kind not in DISTILLATION_KINDS:
            raise ValueError(f"`kind` must be one of {list(DISTILLATION_KINDS)}, got {kind!r}.")
        if not 0.0 <= hidden_weight < math.inf:
            raise ValueError(f"`hidden_weight` must be 0 or more, got {hidden_weight}.")
        self.alpha, self.temperature, self.kind, self.hidden_weight = alpha, temperature, kind, hidden_weight
        self.teacher = frozen_copy(teacher)

    def __call__(
        self,
        pixel_values: torch.Tensor,
        student_logits: torch.Tensor,
        base_loss: torch.Tensor,
        num_images: torch.Tensor | float | None = None,
        hidden_states: Sequence[torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """
        Args:
            pixel_values (`torch.Tensor`): what the student saw, `(batch, channels, height, width)`.
            student_logits (`torch.Tensor`): `(batch, classes)`, with gradient in training.
            base_loss (`torch.Tensor`): loss of the labels, a scalar.
            num_images (`float` or `torch.Tensor`, *optional*):
                What the sum of `base_loss` was divided by; see [`images_averaged_over`]. Default: this batch's images.
            hidden_states (`Sequence[torch.Tensor]`, *optional*): the student's, as transformers gives them: the
                embeddings and what leaves each block, `(batch, tokens, hidden)`. Needed with `hidden_weight`.
        """
        if not student_logits.requires_grad:
            return base_loss
        teacher = self._ask_teacher(pixel_values)
        teacher_logits = teacher.logits
        if teacher_logits.shape != student_logits.shape:
            raise ValueError(
                f"The teacher's logits have shape {tuple(teacher_logits.shape)}, the student's"
                f" {tuple(student_logits.shape)}: a teacher of the same classes is needed."
            )
        total = self._distance(_in_full_precision(student_logits), teacher_logits)
        if self.hidden_weight:
            total = total + self.hidden_weight * distance_of_hidden_states(hidden_states, teacher.hidden_states)
        num_images = len(pixel_values) if num_images is None else num_images
        return (1 - self.alpha) * base_loss + self.alpha * (total / num_images).to(base_loss.dtype)

    def _distance(self, student_logits: torch.Tensor, teacher_logits: torch.Tensor) -> torch.Tensor:
        """Summed over the images of the batch."""
        if self.kind == "hard":
            return functional.cross_entropy(student_logits, teacher_logits.argmax(dim=-1), reduction="sum")
        student, teacher = (
            functional.log_softmax(logits / self.temperature, dim=-1)
            for logits in (student_logits, teacher_logits.to(student_logits.dtype))
        )
        return functional.kl_div(student, teacher, reduction="sum", log_target=True) * self.temperature**2

    @torch.no_grad()
    def _ask_teacher(self, pixel_values: torch.Tensor):
        weight = next(self.teacher.parameters())
        if weight.device != pixel_values.device:
            self.teacher.to(pixel_values.device)
        options = {"output_hidden_states": True} if self.hidden_weight else {}
        return self.teacher(pixel_values.to(weight.dtype), **options)


def distance_of_hidden_states(student: Sequence[torch.Tensor] | None, teacher: Sequence[torch.Tensor]) -> torch.Tensor:
    """
    `1 - cosine` of what leaves each block, mean over blocks and tokens, summed over the images of the batch. The first
    entries, embeddings, are left out.

    Raises:
        ValueError: if there are none, or of other shapes.
    """
    shapes = [[tuple(states.shape) for states in one or ()] for one in (student, teacher)]
    if not student or shapes[0] != shapes[1]:
        raise ValueError(
            f"Hidden states of shapes {shapes[0]} and {shapes[1]} cannot be compared: teacher and student need the"
            " same blocks, width and tokens."
        )
    distances = [
        1 - functional.cosine_similarity(mine.float(), theirs.float(), dim=-1).mean(dim=1)
        for mine, theirs in zip(student[1:], teacher[1:], strict=True)
    ]
    return torch.stack(distances).mean(dim=0).sum()


def frozen_copy(teacher: nn.Module) -> nn.Module:
    """A copy to learn from: in evaluation mode, without gradients, and without token merging, which approximates."""
    teacher = copy.deepcopy(teacher).eval().requires_grad_(False)
    if isinstance(teacher, LambdaPreTrainedModel):
        teacher.config.token_merging_r = (
            0  # also of a model that is prepared for inference, which set_token_merging refuses
        )
    return teacher


def _in_full_precision(logits: torch.Tensor) -> torch.Tensor:
    """Half-precision logits as float32: a sum over a thousand classes needs the digits."""
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
