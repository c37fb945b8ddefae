"""The training program: base model, selection, dilution, removal, evaluation, and everything that is kept of it."""

import copy
import logging
import os

import torch
from accelerate import PartialState
from transformers import DefaultFlowCallback, set_seed

from ..data.dataset import collate
from ..models.checksums import write_checksums
from .arguments import (
    AugmentationArguments,
    DataArguments,
    LambdaTrainingArguments,
    ModelArguments,
    RemovalArguments,
)
from .callback import EntropyGuidedRemovalCallback
from .ema import EmaCallback
from .guards import SaveOnSigterm, StopOnNonFiniteGradient
from .optimization import scaled_learning_rate
from .output_folder import OutputFolder, hold_output_folder, open_output_folder
from .progress import ThroughputCallback
from .reporting import write_report
from .starting_model import load_starting_model
from .tasks import Task, find_task
from .teacher import check_hidden_states, load_teacher
from .trainer import ImageTrainer
from .training_images import TrainingImages, load_splits


logger = logging.getLogger(__name__)


def run_training(
    model_args: ModelArguments,
    data_args: DataArguments,
    augmentation_args: AugmentationArguments,
    removal_args: RemovalArguments,
    training_args: LambdaTrainingArguments,
) -> dict:
    """
    Run the training program and print its table. All that can be wrong with the input is checked before training.

    Returns:
        The contents of `metrics.json`.

    Raises:
        FileExistsError: if the output folder is not empty and neither overwriting nor resuming was asked for, or
            another run writes to it.
        FileNotFoundError, ValueError: on input that cannot work, naming what was expected.
        FloatingPointError: if the gradient becomes NaN.
        SystemExit: after SIGTERM, once a checkpoint is saved.
    """
    model_args, training_args = copy.copy(model_args), copy.copy(training_args)  # the caller keeps its own
    task = find_task(model_args.task)
    _check_training_arguments(training_args)
    task.check(model_args, data_args, augmentation_args, training_args)
    with hold_output_folder(training_args.output_dir):
        return _run_alone(task, model_args, data_args, augmentation_args, removal_args, training_args)


def _run_alone(
    task: Task,
    model_args: ModelArguments,
    data_args: DataArguments,
    augmentation_args: AugmentationArguments,
    removal_args: RemovalArguments,
    training_args: LambdaTrainingArguments,
) -> dict:
    folder = open_output_folder(training_args)
    overwrite = training_args.overwrite_output_dir and not folder.is_resumed
    set_seed(training_args.seed)
    with PartialState().main_process_first():
        splits = load_splits(data_args, task.is_labelled)
    class_names = splits["train"].features["label"].names if task.is_labelled else None
    model, processor, is_new = load_starting_model(
        model_args, class_names, folder, overwrite, data_args.evaluation_crop
    )
    teacher = None
    if training_args.teacher_model_name_or_path is not None:
        teacher = load_teacher(training_args.teacher_model_name_or_path, model, processor)
    if training_args.distillation != "none" and training_args.distillation_hidden_weight:
        check_hidden_states(model, teacher)
    if training_args.ddp_find_unused_parameters is None:
        training_args.ddp_find_unused_parameters = _has_unused_parameters(model)
    images = TrainingImages(splits, processor, data_args, augmentation_args, training_args)
    _scale_learning_rates(model_args, training_args)
    removal = EntropyGuidedRemovalCallback(
        **removal_args.amount(),
        calibration_dataset=images.calibration(removal_args.calibration_size),
        selection=removal_args.selection_config(training_args.seed),
        dilution=removal_args.dilution_config(),
    )
    common = dict(
        train_dataset=images.train,
        eval_dataset=images.evaluation,
        processing_class=processor,
        data_collator=collate,
        train_collator=images.collator,
        compute_metrics=task.compute_metrics,
        repeated_augmentation=augmentation_args.repeated_augmentation,
    )
    averages = [] if training_args.ema_decay is None else [EmaCallback(training_args.ema_decay)]
    trainer = _trainer(task, model, training_args, [*averages, removal], **common)
    _check_schedule(trainer, removal_args, is_new, removes_any=removal.removal.amount.count(model) > 0)
    _check_learning_rates(trainer, model_args.base_learning_rate if is_new else None)
    if overwrite:
        folder.clear()
    folder.bring_base()
    if is_new:
        _train_base(task, model, model_args, training_args, folder, **common)

    base = copy.deepcopy(model)
    if model_args.token_merging_r is not None and not folder.base.is_dir():  # merging is a change of this run
        given = type(model.config).from_pretrained(model_args.model_name_or_path)
        base.set_token_merging(given.token_merging_r, start=given.token_merging_start)
    base_scores = task.scores_of_whole or _evaluate_base(task, base, training_args, **common)
    base.cpu()
    task.teach(trainer, base if teacher is None else teacher, training_args)
    set_seed(training_args.seed)  # as if there had been no base model to train: a resumed run may find it finished
    trainer.train(resume_from_checkpoint=str(folder.checkpoint) if folder.checkpoint else None)
    scores = _scores(task, trainer.evaluate(), "eval")
    # The Trainer may have put a restored callback in the place of ours.
    removal = next(one for one in trainer.callback_handler.callbacks if isinstance(one, EntropyGuidedRemovalCallback))
    push, training_args.push_to_hub = training_args.push_to_hub, False  # not before the card has the measured figures
    trainer.save_model()
    metrics, unreadable = {}, images.count_unreadable()
    if trainer.is_world_process_zero():
        metrics = write_report(
            trainer,
            base,
            removal,
            base_scores,
            scores,
            data_args.dataset_name,
            model_args.model_name_or_path,
            unreadable,
            task.objective,
        )
        write_checksums(folder.path)
        task.show(folder.path, splits["validation"])
    PartialState().wait_for_everyone()
    training_args.push_to_hub = push
    if push:
        trainer.push_to_hub()
    return metrics


def _check_training_arguments(training_args: LambdaTrainingArguments) -> None:
    if training_args.dataloader_drop_last:
        raise ValueError("--dataloader_drop_last would leave out validation images too: the Trainer has one for both.")
    for name in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"):
        if getattr(training_args, name) < 1:
            raise ValueError(f"`{name}` must be 1 or more, got {getattr(training_args, name)}.")
    if training_args.weight_decay < 0:
        raise ValueError(f"`weight_decay` must not be negative, got {training_args.weight_decay}.")
    asked_for_more = os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true" and "MASTER_ADDR" in os.environ
    if asked_for_more and training_args.world_size == 1:
        raise ValueError(
            "`accelerate launch --cpu --num_processes N` started one process: it needs MPI for more. Use --config_file"
            " trainer_scripts/accelerate_configs/two_cpu_processes.yaml and --use_cpu true instead."
        )
    if training_args.learning_rate_granularity not in ("step", "epoch"):
        raise ValueError(
            f"`learning_rate_granularity` must be step or epoch, got {training_args.learning_rate_granularity!r}."
        )
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true" or training_args.fsdp:
        raise ValueError("This program copies the whole model before removal, which FSDP splits up: use DDP.")
    if training_args.save_only_model:
        raise ValueError("With --save_only_model no run could be resumed: leave it out.")
    is_timms = training_args.min_learning_rate is not None
    if not is_timms and (training_args.warmup_epochs or training_args.learning_rate_granularity == "epoch"):
        raise ValueError(
            "`warmup_epochs` and `learning_rate_granularity` need timm's cosine: give --min_learning_rate."
        )
    if is_timms and training_args.warmup_steps:
        raise ValueError("timm's cosine warms up by --warmup_epochs: leave --warmup_steps out.")
    training_args.dataloader_pin_memory = training_args.dataloader_pin_memory and training_args.device.type != "cpu"


def _has_unused_parameters(model) -> bool:
    """Whether no loss here reaches a parameter: DistributedDataParallel would wait for it. Attention that is off is in
    the graph."""
    names = [name.removeprefix(f"{model.base_model_prefix}.") for name, _ in model.named_parameters()]
    return any(name == "embeddings.mask_token" or name.startswith("pooler.") for name in names)


def _scale_learning_rates(model_args: ModelArguments, training_args: LambdaTrainingArguments) -> None:
    if training_args.learning_rate_batch_size is None:
        return
    batch = training_args.train_batch_size * training_args.world_size * training_args.gradient_accumulation_steps
    for args, name in ((training_args, "learning_rate"), (model_args, "base_learning_rate")):
        scaled = scaled_learning_rate(getattr(args, name), batch, training_args.learning_rate_batch_size)
        logger.info("%s for batches of %d: %.3g.", name, batch, scaled)
        setattr(args, name, scaled)


def _check_schedule(trainer: ImageTrainer, removal_args: RemovalArguments, is_new: bool, removes_any: bool) -> None:
    """Lambda must have room to fall, and an average to forget what was before: known before any training."""
    steps_per_epoch, total_steps = trainer.count_steps()
    by_epoch = [
        name
        for name, asked in (
            ("a base model or a new classifier", is_new),
            ("--granularity epoch", removal_args.granularity == "epoch"),
            ("--learning_rate_granularity epoch", trainer.args.learning_rate_granularity == "epoch"),
            ("--warmup_epochs", trainer.args.warmup_epochs),
        )
        if asked
    ]
    if steps_per_epoch is None and by_epoch:
        raise ValueError(f"A stream of unknown length has no epochs, but {', '.join(by_epoch)} need them.")
    dilution = removal_args.dilution_config().schedule_for(total_steps, steps_per_epoch)
    decay, hold = trainer.args.ema_decay, total_steps - dilution.first_zero_step
    if decay is not None and removes_any and 1 / (1 - decay) > hold:
        raise ValueError(
            f"An average with ema_decay {decay} looks back over {1 / (1 - decay):,.0f} steps, but only {hold:,} are"
            " trained at lambda = 0: it would mix the removed model with what was before. At most"
            f" {1 - 1 / max(hold, 2):.6g} fits here; or train longer."
        )


def _check_learning_rates(trainer: ImageTrainer, base_learning_rate: float | None) -> None:
    """Peak, floor and warm-up must fit together, in the base model's training too: known before any training."""
    for rate in (trainer.args.learning_rate, base_learning_rate):
        if rate is not None and trainer.args.min_learning_rate is not None:
            optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=rate)
            trainer.create_scheduler(trainer.count_steps()[1], optimizer)
            trainer.lr_scheduler = None


def _trainer(task: Task, model, args: LambdaTrainingArguments, callbacks: list, **common) -> ImageTrainer:
    # One that ends the run comes first, and speed before the trackers that report it.
    callbacks = [
        SaveOnSigterm(),
        *callbacks,
        StopOnNonFiniteGradient(),
        ThroughputCallback(),
    ]
    trainer = task.trainer_class(model=model, args=args, callbacks=callbacks, **common)
    # What decides about logging and evaluating stays in front of ours; trackers, which the Trainer adds, come after.
    present = trainer.callback_handler.callbacks
    flow = [callback for callback in present if isinstance(callback, DefaultFlowCallback)]
    rest = [callback for callback in present if callback not in callbacks and callback not in flow]
    trainer.callback_handler.callbacks = [*flow, *callbacks, *rest]
    return trainer


def _train_base(
    task: Task,
    model,
    model_args: ModelArguments,
    training_args: LambdaTrainingArguments,
    folder: OutputFolder,
    **common,
) -> None:
    args = copy.copy(training_args)
    args.output_dir = str(folder.base_training)
    args.num_train_epochs, args.learning_rate = model_args.base_num_train_epochs, model_args.base_learning_rate
    args.warmup_epochs = min(args.warmup_epochs, args.num_train_epochs)
    args.max_steps, args.load_best_model_at_end, args.push_to_hub = -1, False, False
    trainer = _trainer(task, model, args, [], **common)
    logger.info("Training the base model for %s epochs.", args.num_train_epochs)
    trainer.train(resume_from_checkpoint=str(folder.base_checkpoint) if folder.base_checkpoint else None)
    trainer.save_model()
    PartialState().wait_for_everyone()
    folder.keep_base()


def _evaluate_base(task: Task, base, training_args: LambdaTrainingArguments, **common) -> dict[str, float]:
    """Scores of a copy: accelerate would not wrap a model that was evaluated, and each process would train its own."""
    args = copy.copy(training_args)
    args.push_to_hub = False
    return _scores(task, _trainer(task, base, args, [], **common).evaluate(metric_key_prefix="base"), "base")


def _scores(task: Task, evaluation: dict, prefix: str) -> dict[str, float]:
    return {name: evaluation[f"{prefix}_{metric}"] for name, metric in task.scores.items()}
