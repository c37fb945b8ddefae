"""The main job: base model, selection, dilution, removal, evaluation, and everything that is kept of it."""

import copy
import logging
import math
import os
import shutil
from pathlib import Path

from accelerate import PartialState
from transformers import Trainer, ViTImageProcessor, set_seed

from .arguments import DataArguments, LambdaTrainingArguments, ModelArguments, RemovalArguments
from .callback import EntropyGuidedRemovalCallback
from .checkpoints import find_resumable_checkpoint, what_is_broken
from .configuration_lambda_vit import LambdaViTConfig
from .data import AugmentationEpoch, ProcessedImages, RandomShift, check_images, collate, load_image_dataset
from .dilution import DilutionSchedule
from .guards import StopOnNonFiniteGradient
from .metrics import classification_metrics
from .modeling_lambda_vit import LambdaViTForImageClassification
from .reporting import classify_one, write_report


logger = logging.getLogger(__name__)

BASE_FOLDER = "base"
_SHAPE = (
    "patch_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "initializer_range",
)


def run_training(
    model_args: ModelArguments,
    data_args: DataArguments,
    removal_args: RemovalArguments,
    training_args: LambdaTrainingArguments,
) -> dict:
    """
    Run the main job and print its table. Everything that can be wrong with the input is checked before any training.

    Returns:
        The contents of `metrics.json`.

    Raises:
        FileExistsError: if the output folder is not empty and neither overwriting nor resuming was asked for.
        FileNotFoundError, ValueError: on input that cannot work, naming what was expected.
        FloatingPointError: if the gradient becomes NaN.
    """
    output_dir = Path(training_args.output_dir)
    checkpoint = _prepare_output_dir(output_dir, training_args)
    set_seed(training_args.seed)
    with PartialState().main_process_first():
        dataset = load_image_dataset(
            data_args.dataset_name,
            data_args.dataset_dir,
            config_name=data_args.dataset_config,
            image_column=data_args.image_column,
            label_column=data_args.label_column,
        )
        for split in dataset.values():
            check_images(split)
    class_names = dataset["train"].features["label"].names
    model, processor, is_new = _load_model(
        model_args, class_names, output_dir, checkpoint, training_args.overwrite_output_dir
    )
    augmentation = RandomShift(data_args.random_shift) if data_args.random_shift else None
    train_images = ProcessedImages(dataset["train"], processor, augmentation, training_args.seed)
    eval_images = ProcessedImages(dataset["validation"], processor)
    removal = EntropyGuidedRemovalCallback(
        **vars(removal_args),
        calibration_dataset=ProcessedImages(dataset["train"], processor),
    )
    _check_training_arguments(training_args)
    training_args.dataloader_pin_memory = training_args.dataloader_pin_memory and training_args.device.type != "cpu"
    if training_args.ddp_find_unused_parameters is None:
        training_args.ddp_find_unused_parameters = False  # attention that is off is in the graph, see LambdaViTLayer
    common = dict(
        train_dataset=train_images,
        eval_dataset=eval_images,
        processing_class=processor,
        data_collator=collate,
        compute_metrics=classification_metrics,
    )
    trainer = _trainer(model, training_args, [removal, StopOnNonFiniteGradient()], **common)
    _check_schedule(removal_args, training_args, len(train_images))
    if training_args.overwrite_output_dir and checkpoint is None:
        _clear_output_dir(output_dir)
    if is_new:
        _train_base(model, model_args, training_args, **common)

    base_accuracy = trainer.evaluate(metric_key_prefix="base")["base_accuracy"]
    base = copy.deepcopy(model).cpu()
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    accuracy = trainer.evaluate()["eval_accuracy"]
    # The Trainer may have put a restored callback in the place of ours.
    removal = next(one for one in trainer.callback_handler.callbacks if isinstance(one, EntropyGuidedRemovalCallback))
    push, training_args.push_to_hub = training_args.push_to_hub, False  # not before the card has the measured figures
    trainer.save_model()
    metrics = {}
    if trainer.is_world_process_zero():
        metrics = write_report(
            trainer,
            base,
            removal.selection,
            base_accuracy,
            accuracy,
            data_args.dataset_name,
            model_args.model_name_or_path,
        )
        classify_one(output_dir, dataset["validation"])
    PartialState().wait_for_everyone()
    training_args.push_to_hub = push
    if push:
        trainer.push_to_hub()
    return metrics


def _check_training_arguments(training_args: LambdaTrainingArguments) -> None:
    if training_args.dataloader_drop_last:
        raise ValueError("--dataloader_drop_last would leave out validation images too: the Trainer has one for both.")
    asked_for_more = os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true" and "MASTER_ADDR" in os.environ
    if asked_for_more and training_args.world_size == 1:
        raise ValueError(
            "`accelerate launch --cpu --num_processes N` started one process: it needs MPI for more. Use --config_file"
            " trainer_scripts/accelerate_configs/two_cpu_processes.yaml and --use_cpu true instead."
        )


def _prepare_output_dir(output_dir: Path, training_args: LambdaTrainingArguments) -> Path | None:
    """Checks the folder before anything is written to it; the checkpoint to resume from, if any."""
    if output_dir.exists() and not output_dir.is_dir():
        raise FileExistsError(f"The output folder {output_dir} is a file.")
    wish = training_args.resume_from_checkpoint
    if wish is not None and str(wish).lower() != "false":
        if str(wish).lower() != "true":
            problem = what_is_broken(wish)
            if problem:
                raise ValueError(f"Cannot resume from {wish}: {problem}.")
            return Path(wish)
        checkpoint = find_resumable_checkpoint(output_dir)
        if checkpoint is None:
            logger.warning("No whole checkpoint in %s; starting from the beginning.", output_dir)
        return checkpoint
    if output_dir.is_dir() and any(output_dir.iterdir()) and not training_args.overwrite_output_dir:
        raise FileExistsError(
            f"The output folder {output_dir} is not empty. Pass --overwrite_output_dir to start anew in it,"
            " --resume_from_checkpoint true to go on with an interrupted run, or another --output_dir."
        )
    return None


def _clear_output_dir(output_dir: Path) -> None:
    """Deletes what an earlier run would be resumed from, once nothing else can go wrong before training."""
    if PartialState().is_main_process:
        for old in [*output_dir.glob("checkpoint-*"), output_dir / BASE_FOLDER]:
            shutil.rmtree(old, ignore_errors=True)
    PartialState().wait_for_everyone()


def _check_schedule(removal_args: RemovalArguments, training_args: LambdaTrainingArguments, num_images: int) -> None:
    """Lambda must have room to fall: known before the base model is trained."""
    batches = math.ceil(num_images / (training_args.train_batch_size * training_args.world_size))
    steps = math.ceil(batches / training_args.gradient_accumulation_steps)
    total = math.ceil(training_args.num_train_epochs * steps)
    total = training_args.max_steps if training_args.max_steps > 0 else total
    per_update = steps if removal_args.granularity == "epoch" else 1
    DilutionSchedule(total, removal_args.hold_share, removal_args.schedule, per_update)


def _load_model(
    model_args: ModelArguments, class_names: list[str], output_dir: Path, checkpoint: Path | None, overwrite: bool
):
    """Model, image processor, and whether model or classifier are new and have to be trained first."""
    labels = {
        "id2label": dict(enumerate(class_names)),
        "label2id": {name: index for index, name in enumerate(class_names)},
    }
    optional = ("drop_path_rate", "drop_path_schedule", "image_size", "attn_implementation")
    given = {name: getattr(model_args, name) for name in optional if getattr(model_args, name) is not None}
    source = model_args.model_name_or_path
    base = (checkpoint.parent if checkpoint else output_dir) / BASE_FOLDER
    if checkpoint is not None and base.is_dir():
        source = str(base)
    elif checkpoint is not None and source is None:
        raise FileNotFoundError(f"The run of {checkpoint} trained a base model, but {base} is gone: start anew.")
    if source is not None:
        folders = [base.resolve(), *(folder.resolve() for folder in output_dir.glob("checkpoint-*"))]
        if overwrite and Path(source).resolve() in folders:
            raise ValueError(f"--overwrite_output_dir would delete {source}, the model to start from.")
        stored = LambdaViTConfig.from_pretrained(source)
        is_other_task = stored.num_labels != len(class_names)
        if is_other_task and not model_args.ignore_mismatched_sizes:
            raise ValueError(
                f"{source} has {stored.num_labels} classes, the dataset has {len(class_names)}. Pass"
                " --ignore_mismatched_sizes to replace the classifier."
            )
        model = LambdaViTForImageClassification.from_pretrained(
            source,
            ignore_mismatched_sizes=model_args.ignore_mismatched_sizes,
            **labels,
            **given,
        )
        processor = ViTImageProcessor.from_pretrained(source)
        if "image_size" in given:
            processor.size = {"height": model_args.image_size, "width": model_args.image_size}
        # A new classifier knows nothing yet: neither entropy nor the accuracy before removal would mean anything.
        return model, processor, is_other_task
    config = LambdaViTConfig(**{name: getattr(model_args, name) for name in _SHAPE}, **labels, **given)
    processor = ViTImageProcessor(size={"height": config.image_size, "width": config.image_size})
    return LambdaViTForImageClassification(config), processor, True


def _trainer(model, args: LambdaTrainingArguments, callbacks: list, **common) -> Trainer:
    callbacks = [*callbacks, AugmentationEpoch(common["train_dataset"])]
    trainer = Trainer(model=model, args=args, callbacks=callbacks, **common)
    # In front of the trackers that the Trainer adds itself, so that they see lambda in the logs.
    rest = [callback for callback in trainer.callback_handler.callbacks if callback not in callbacks]
    trainer.callback_handler.callbacks = [*callbacks, *rest]
    return trainer


def _train_base(model, model_args: ModelArguments, training_args: LambdaTrainingArguments, **common) -> None:
    args = copy.copy(training_args)
    args.output_dir = str(Path(training_args.output_dir) / BASE_FOLDER)
    args.num_train_epochs, args.learning_rate = model_args.base_num_train_epochs, model_args.base_learning_rate
    args.max_steps, args.save_strategy, args.load_best_model_at_end, args.push_to_hub = -1, "no", False, False
    trainer = _trainer(model, args, [StopOnNonFiniteGradient()], **common)
    logger.info("Training the base model for %s epochs.", args.num_train_epochs)
    trainer.train()
    trainer.save_model()
    PartialState().wait_for_everyone()
