"""The Hugging Face Trainer for images: what DeiT's recipe needs beyond it, and classification of images."""

import math
from collections.abc import Callable

import torch
from torch.utils.data import DataLoader
from transformers.trainer_utils import has_length

from ..data.dataset import AugmentationEpoch
from ..data.mixing import RepeatedAugmentationSampler
from ..data.streaming import StreamedImages
from ..models.problem_type import SINGLE_LABEL, problem_type_of
from .guards import OneModelInAllProcesses
from .losses import ClassificationLoss, DistillationLoss, images_averaged_over
from .optimization import cosine_schedule, decay_parameter_names
from .trainer_mixin import LambdaViTTrainer


class ImageTrainer(LambdaViTTrainer):
    """
    A [`Trainer`] on images, whatever their loss.

    Differences from [`LambdaViTTrainer`]:

    - `train_collator` makes the training batches (mixup), `data_collator` those of evaluation.
    - No weight decay on biases, norms, class token and position embeddings, as in timm.
    - timm's cosine learning rate, with floor, where `args` are [`LambdaTrainingArguments`] with `min_learning_rate`.
    - Repeated augmentation; the epoch is told to the training images in every process.
    - A streamed training set is read by each process for itself: accelerate would have one process read for all, or
      each read everything.
    - Several processes make sure that they train one model.

    Args:
        train_collator (`Callable`, *optional*): defaults to `data_collator`.
        repeated_augmentation (`int`, *optional*, defaults to 1): how often an image is drawn.
        kwargs: everything [`Trainer`] takes.
    """

    def __init__(
        self,
        *args,
        train_collator: Callable | None = None,
        repeated_augmentation: int = 1,
        **kwargs,
    ):
        super().__init__(*args, **kwargs)
        self.train_collator = train_collator or self.data_collator
        self.args.remove_unused_columns = False  # what only the collator needs would be taken out before it
        self.repeats = None
        if repeated_augmentation > 1:
            self.repeats = RepeatedAugmentationSampler(
                len(self.train_dataset),
                self._train_batch_size,
                repeated_augmentation,
                seed=self.args.seed,
                num_processes=self.args.world_size,
            )
        for told in (self.train_dataset, self.repeats):
            # accelerate tells the epoch in one process; in several, or after resuming, it may not.
            if hasattr(told, "set_epoch"):
                self.add_callback(AugmentationEpoch(told))
        self.add_callback(OneModelInAllProcesses())

    def count_steps(self) -> tuple[int | None, int]:
        """
        Optimizer steps of an epoch (`None` for a stream of unknown length) and of the whole training.

        Raises:
            ValueError: if the length of training is not known.
        """
        dataloader, args = self.get_train_dataloader(), self.args
        if not has_length(dataloader):
            if args.max_steps <= 0:
                raise ValueError("The stream does not say how many images it has: --max_steps is needed.")
            return None, args.max_steps
        steps = max(1, math.ceil(len(dataloader) / args.gradient_accumulation_steps))
        return steps, args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * steps)

    def get_train_dataloader(self) -> DataLoader:
        evaluation_collator, self.data_collator = self.data_collator, self.train_collator
        try:
            if isinstance(self.train_dataset, StreamedImages):
                return self._loader_of_stream()
            return super().get_train_dataloader()
        finally:
            self.data_collator = evaluation_collator

    def _loader_of_stream(self) -> DataLoader:
        args = self.args
        return self.train_dataset.loader(
            self._train_batch_size,
            num_workers=args.dataloader_num_workers,
            collate_fn=self.train_collator,
            pin_memory=args.dataloader_pin_memory,
            persistent_workers=args.dataloader_persistent_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
        )

    def _get_train_sampler(self, train_dataset=None):
        return super()._get_train_sampler(train_dataset) if self.repeats is None else self.repeats

    def _run_epoch(self, *args, **kwargs):
        if self.state.global_step >= self.state.max_steps:
            # Resumed at the very end, in the middle of an epoch: the Trainer would train one step more.
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def get_decay_parameter_names(self, model) -> list[str]:
        return decay_parameter_names(model)

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None):
        if getattr(self.args, "min_learning_rate", None) is None:  # plain TrainingArguments have none
            return super().create_scheduler(num_training_steps, optimizer)
        if self.lr_scheduler is None:
            steps_per_epoch = self.count_steps()[0] or 1
            self.lr_scheduler = cosine_schedule(
                optimizer or self.optimizer,
                total_steps=num_training_steps,
                warmup_steps=round(self.args.warmup_epochs * steps_per_epoch),
                min_learning_rate=self.args.min_learning_rate,
                warmup_learning_rate=self.args.warmup_learning_rate,
                steps_per_update=steps_per_epoch if self.args.learning_rate_granularity == "epoch" else 1,
            )
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def images_of_loss(self, labels: torch.Tensor, num_items_in_batch=None) -> torch.Tensor | float:
        """What the loss of a batch, summed over its images, is divided by; see [`images_averaged_over`]."""
        num_images = images_averaged_over(labels, num_items_in_batch)
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            # DDP takes the mean of the processes' gradients, DataParallel that of its GPUs' losses.
            num_images = num_images / (self.accelerator.num_processes if self.args.n_gpu <= 1 else self.args.n_gpu)
        return num_images


class ImageClassificationTrainer(ImageTrainer):
    """
    An [`ImageTrainer`] for image classification: one class for each image.

    Differences from [`ImageTrainer`]: soft labels, and images without a label (-100), in the loss; optionally
    distillation from a teacher.

    Raises:
        ValueError: if the model is one for several labels, or for regression.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        _check_task(self.model)
        self.distillation: DistillationLoss | None = None
        self.compute_loss_func = ClassificationLoss(self.args.label_smoothing_factor)

    def compute_loss(self, model, inputs, return_outputs: bool = False, num_items_in_batch=None):
        # The labels are taken out of the inputs below.
        num_images = self.images_of_loss(inputs["labels"], num_items_in_batch)
        pixel_values = inputs["pixel_values"]
        if self.distillation is not None and self.distillation.hidden_weight and model.training:
            inputs = {**inputs, "output_hidden_states": True}
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch)
        if self.distillation is not None:
            with self.accelerator.autocast():  # which accelerate has put around the student's forward only
                loss = self.distillation(pixel_values, outputs.logits, loss, num_images, outputs.hidden_states)
        return (loss, outputs) if return_outputs else loss


def _check_task(model) -> None:
    config = getattr(model, "config", None)
    if config is None or problem_type_of(config) == SINGLE_LABEL:
        return
    found = f"`problem_type` {getattr(config, 'problem_type', None)!r} and `num_labels` {config.num_labels}"
    raise ValueError(
        f"ImageClassificationTrainer trains one of several classes for each image; the model has {found}. Use"
        " LambdaViTTrainer, which takes the model's own loss, with the same callbacks."
    )
