"""The images of a training as its arguments ask for them: those trained on, evaluated on, and selected on."""

from collections.abc import Callable

import datasets
from accelerate.utils import gather_object

from ..data.augmentation import deit_augmentation
from ..data.dataset import ProcessedImages, RandomShift, check_images, collate
from ..data.decoding import UnreadableImages
from ..data.folders import load_image_dataset
from ..data.mixing import MixupCollator
from ..data.sampling import evenly_spaced
from ..data.shards import sizes_of_stream
from ..data.streaming import StreamedImages, sample_of_stream
from .arguments import AugmentationArguments, DataArguments, LambdaTrainingArguments


def load_splits(
    data_args: DataArguments, labelled: bool = True
) -> dict[str, datasets.Dataset | datasets.IterableDataset]:
    """
    Splits `train` and `validation` with columns `image` and `label`, whose class names are set. Not `labelled`, all
    images are of one class.

    Raises:
        FileNotFoundError, ValueError: on a dataset that cannot be used, a wrong number of `class_names`, or numbers of
            images that are below 1 or asked of a stream.
    """
    limits = {"max_train_samples": data_args.max_train_samples, "max_eval_samples": data_args.max_eval_samples}
    for name, limit in limits.items():
        if limit is not None and (limit < 1 or data_args.streaming):
            reason = "a stream is read as it is" if data_args.streaming else f"it must be 1 or more, not {limit}"
            raise ValueError(f"--{name}: {reason}.")
    splits = load_image_dataset(
        data_args.dataset_name,
        data_args.dataset_dir,
        config_name=data_args.dataset_config,
        image_column=data_args.image_column,
        label_column=data_args.label_column,
        streaming=data_args.streaming,
        train_dir=data_args.train_dir,
        validation_dir=data_args.validation_dir,
        class_names=data_args.class_names,
        labelled=labelled,
    )
    for split, limit in zip(("train", "validation"), limits.values(), strict=True):
        if limit is not None:
            splits[split] = splits[split].select(evenly_spaced(len(splits[split]), limit))
    return splits


class TrainingImages:
    """
    Training, evaluation and calibration images of one run.

    Args:
        splits (`dict`): as [`load_splits`] returns them.
        image_processor: a Hugging Face image processor.
        data_args, augmentation_args, training_args: the program's arguments.

    Attributes:
        train ([`ProcessedImages`] or [`StreamedImages`]): augmented; this process's share where they are streamed.
        evaluation ([`ProcessedImages`]): not augmented.
        collator (`Callable`): makes the batches of training.
        unreadable (`dict[str, UnreadableImages]`): by split, what could not be decoded.

    Raises:
        ValueError: on augmentations that exclude each other, on labels outside the classes.
        UnreadableImageError: if too many files are no images.
    """

    def __init__(
        self,
        splits: dict,
        image_processor,
        data_args: DataArguments,
        augmentation_args: AugmentationArguments,
        training_args: LambdaTrainingArguments,
    ):
        check_augmentation(augmentation_args, data_args.streaming)
        self.splits, self.image_processor, self.data_args = splits, image_processor, data_args
        sizes = {
            split: sizes_of_stream(part)[0] if isinstance(part, datasets.IterableDataset) else len(part)
            for split, part in splits.items()
        }
        self.unreadable = {
            split: UnreadableImages(data_args.unreadable_images, data_args.max_unreadable_share, num_images=size)
            for split, size in sizes.items()
        }
        for split, part in splits.items():
            if isinstance(part, datasets.Dataset):
                check_images(part, unreadable=self.unreadable[split])
        mixes = bool(augmentation_args.mixup or augmentation_args.cutmix)
        self.collator = self._collator(augmentation_args, training_args) if mixes else collate
        common = dict(
            augmentation=self._augmentation(augmentation_args),
            seed=training_args.seed,
            unreadable=self.unreadable["train"],
            with_draws=mixes,
        )
        if data_args.streaming:
            self.train = StreamedImages(
                splits["train"],
                image_processor,
                buffer_size=data_args.shuffle_buffer_size,
                num_images=sizes["train"],
                process_index=training_args.process_index,
                num_processes=training_args.world_size,
                **common,
            )
        else:
            self.train = ProcessedImages(splits["train"], image_processor, **common)
        self.evaluation = ProcessedImages(
            splits["validation"], image_processor, unreadable=self.unreadable["validation"], is_evaluation=True
        )

    def calibration(self, size: int) -> ProcessedImages:
        """Training images without augmentation, to select layers on: the same in every process."""
        train = self.splits["train"]
        images = sample_of_stream(train, size) if self.data_args.streaming else train
        return ProcessedImages(images, self.image_processor, unreadable=self.unreadable["train"])

    def count_unreadable(self) -> dict[str, int]:
        """How many images of each split could not be decoded so far. All processes must ask together."""
        return {split: len(set(gather_object(one.names))) for split, one in self.unreadable.items()}

    def _augmentation(self, options: AugmentationArguments) -> Callable | None:
        if options.random_shift:
            return RandomShift(options.random_shift)
        if not options.random_resized_crop:
            return None
        return deit_augmentation(
            self.image_processor,
            auto_augment=options.auto_augment,
            color_jitter=options.color_jitter,
            random_erasing=options.random_erasing,
            random_erasing_mode=options.random_erasing_mode,
        )

    def _collator(self, options: AugmentationArguments, training_args: LambdaTrainingArguments) -> MixupCollator:
        return MixupCollator(
            len(self.splits["train"].features["label"].names),
            mixup=options.mixup,
            cutmix=options.cutmix,
            switch_prob=options.mixup_switch_prob,
            label_smoothing=training_args.label_smoothing_factor,
        )


def check_augmentation(options: AugmentationArguments, streaming: bool) -> None:
    """
    Raises:
        ValueError: on augmentations that exclude or need each other.
    """
    needs_crop = [name for name in ("auto_augment", "color_jitter", "random_erasing") if getattr(options, name)]
    if needs_crop and not options.random_resized_crop:
        raise ValueError(f"{needs_crop} are part of timm's transform: turn `random_resized_crop` on, too.")
    if options.random_shift and options.random_resized_crop:
        raise ValueError("`random_shift` and `random_resized_crop` both move the picture: choose one.")
    if options.repeated_augmentation < 1:
        raise ValueError(f"`repeated_augmentation` must be 1 (off) or more, got {options.repeated_augmentation}.")
    if options.repeated_augmentation > 1 and streaming:
        raise ValueError("`repeated_augmentation` draws images by index, which a stream has not: set it to 1.")
