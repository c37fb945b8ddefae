"""The main job: base model, selection, dilution, removal, evaluation, and everything that is kept of it."""

import copy
import json
import logging
import shutil
from pathlib import Path

import torch
import transformers
from accelerate import PartialState
from transformers import Trainer, ViTImageProcessor, set_seed

from .accounting import count_macs, count_parameters, summarize
from .arguments import DataArguments, LambdaTrainingArguments, ModelArguments, RemovalArguments
from .benchmarking import describe_environment, images_per_second
from .callback import EntropyGuidedRemovalCallback, StopOnNonFiniteGradient
from .checkpoints import find_resumable_checkpoint, what_is_broken
from .configuration_lambda_vit import LambdaViTConfig
from .data import ProcessedImages, check_images, collate, load_image_dataset, random_shift
from .metrics import classification_metrics
from .model_card import ModelCardFacts, write_model_card
from .modeling_lambda_vit import LambdaViTForImageClassification
from .plotting import plot_layer_entropies, plot_training


logger = logging.getLogger(__name__)

BASE_FOLDER = "base"


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
        dataset = load_image_dataset(data_args.dataset_name, data_args.dataset_dir)
        for split in dataset.values():
            check_images(split)
    model, processor, is_new = _load_model(model_args, dataset["train"].features["label"].names, output_dir, checkpoint)
    train_images = ProcessedImages(dataset["train"], processor, _augmentation(data_args, model), training_args.seed)
    eval_images = ProcessedImages(dataset["validation"], processor)
    removal = EntropyGuidedRemovalCallback(
        **{name: value for name, value in vars(removal_args).items()},
        calibration_dataset=ProcessedImages(dataset["train"], processor),
    )
    common = dict(
        train_dataset=train_images,
        eval_dataset=eval_images,
        processing_class=processor,
        data_collator=collate,
        compute_metrics=classification_metrics,
    )
    trainer = _trainer(model, training_args, [removal, StopOnNonFiniteGradient()], **common)
    if is_new:
        _train_base(model, model_args, training_args, **common)

    base_accuracy = trainer.evaluate(metric_key_prefix="base")["base_accuracy"]
    base = copy.deepcopy(model).cpu()
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    accuracy = trainer.evaluate()["eval_accuracy"]
    trainer.save_model()
    metrics = {}
    if trainer.is_world_process_zero():
        metrics = _report(output_dir, trainer, base, removal, base_accuracy, accuracy, model_args, data_args)
        _classify_one(output_dir, dataset["validation"])
    PartialState().wait_for_everyone()
    return metrics


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
    if output_dir.is_dir() and any(output_dir.iterdir()):
        if not training_args.overwrite_output_dir:
            raise FileExistsError(
                f"The output folder {output_dir} is not empty. Pass --overwrite_output_dir to start anew in it,"
                " --resume_from_checkpoint true to go on with an interrupted run, or another --output_dir."
            )
        with PartialState().main_process_first():
            for old in [*output_dir.glob("checkpoint-*"), output_dir / BASE_FOLDER]:
                shutil.rmtree(old, ignore_errors=True)
    return None


def _load_model(model_args: ModelArguments, class_names: list[str], output_dir: Path, checkpoint: Path | None):
    """Model, image processor, and whether the model still has to be trained from scratch."""
    labels = {
        "id2label": dict(enumerate(class_names)),
        "label2id": {name: index for index, name in enumerate(class_names)},
    }
    drop_path = {"drop_path_rate": model_args.drop_path_rate, "drop_path_schedule": model_args.drop_path_schedule}
    source = model_args.model_name_or_path
    base = output_dir / BASE_FOLDER
    if source is None and checkpoint is not None:
        source = str(base)
    if source is not None:
        stored = LambdaViTConfig.from_pretrained(source)
        if stored.num_labels != len(class_names) and not model_args.ignore_mismatched_sizes:
            raise ValueError(
                f"{source} has {stored.num_labels} classes, the dataset has {len(class_names)}. Pass"
                " --ignore_mismatched_sizes to replace the classifier."
            )
        model = LambdaViTForImageClassification.from_pretrained(
            source,
            ignore_mismatched_sizes=model_args.ignore_mismatched_sizes,
            attn_implementation=model_args.attn_implementation,
            **labels,
            **drop_path,
        )
        return model, ViTImageProcessor.from_pretrained(source), False
    shape = ("image_size", "patch_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
             "initializer_range")  # fmt: skip
    config = LambdaViTConfig(**{name: getattr(model_args, name) for name in shape}, **labels, **drop_path)
    if model_args.attn_implementation:
        config._attn_implementation = model_args.attn_implementation
    processor = ViTImageProcessor(size={"height": model_args.image_size, "width": model_args.image_size})
    return LambdaViTForImageClassification(config), processor, True


def _augmentation(data_args: DataArguments, model):
    return random_shift(model.config.image_size, data_args.random_shift) if data_args.random_shift else None


def _trainer(model, args: LambdaTrainingArguments, callbacks: list, **common) -> Trainer:
    trainer = Trainer(model=model, args=args, **common)
    # In front of the trackers that the Trainer adds itself, so that they see lambda in the logs.
    for callback in reversed(callbacks):
        trainer.add_callback(callback)
        trainer.callback_handler.callbacks.insert(0, trainer.callback_handler.callbacks.pop())
    removal = callbacks[0]
    if isinstance(removal, EntropyGuidedRemovalCallback):
        removal.on_init_end(args, trainer.state, trainer.control, model=model)
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


def _report(output_dir: Path, trainer, base, removal, base_accuracy, accuracy, model_args, data_args) -> dict:
    model, selection = trainer.model, removal.selection
    size = trainer.model.config.image_size
    pixel_values = torch.randn(64, model.config.num_channels, size, size, device=model.device)
    speed = images_per_second({"before": base.to(model.device), "after": model}, pixel_values)
    base_dir = output_dir / "base_for_size"
    base.save_pretrained(base_dir)
    sizes = {"before": (base_dir / "model.safetensors").stat().st_size}
    shutil.rmtree(base_dir)
    sizes["after"] = (output_dir / "model.safetensors").stat().st_size
    metrics = {
        name: {
            "top1": top1,
            "parameters": count_parameters(one),
            "macs": count_macs(one.config),
            "file_bytes": sizes[name],
            "images_per_second": speed[name],
        }
        for name, one, top1 in (("before", base, base_accuracy), ("after", model, accuracy))
    }
    metrics |= {"layers": selection.layers, "environment": describe_environment()}
    (output_dir / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    selection.save(output_dir / "selection.json")
    pictures = {"training": "training.png"}
    plot_training(trainer.state.log_history, output_dir / "training.png", base_accuracy)
    if selection.mlp_entropy:
        pictures["entropy"] = "entropy.png"
        plot_layer_entropies(selection, output_dir / "entropy.png")
    rows = comparison_rows(metrics)
    write_model_card(output_dir, _card_facts(output_dir, trainer.args, rows, metrics, selection, pictures, model_args,
                                             data_args))  # fmt: skip
    print("\n" + summarize(model) + "\n")
    print(_text_table(rows))
    print(f"attention removed in layers {selection.layers} of {model.config.num_hidden_layers}, chosen by {selection.strategy}")
    return metrics


def comparison_rows(metrics: dict) -> dict[str, tuple[str, str]]:
    """Rows of the before / after table, as printed, from the contents of `metrics.json`."""

    def row(name, form):
        return tuple(form(metrics[when][name]) for when in ("before", "after"))

    return {
        "top-1": row("top1", lambda value: f"{100 * value:.2f} %"),
        "parameters": row("parameters", lambda value: f"{value:,}"),
        "MACs per image": row("macs", lambda value: f"{value / 1e6:,.2f} M"),
        "file size": row("file_bytes", lambda value: f"{value / 1e6:.3f} MB"),
        "images/s (median)": row("images_per_second", lambda value: f"{value:,.0f}"),
    }


def _text_table(rows: dict[str, tuple[str, str]]) -> str:
    return "\n".join(f"{name:<20}{before:>16}{after:>16}" for name, (before, after) in {"": ("before", "after"), **rows}.items())


def _card_facts(output_dir, args, rows, metrics, selection, pictures, model_args, data_args) -> ModelCardFacts:
    environment = metrics["environment"]
    return ModelCardFacts(
        name=output_dir.resolve().name,
        rows=rows,
        selection=selection,
        training={
            "epochs": str(args.num_train_epochs),
            "global batch size": str(args.train_batch_size * args.gradient_accumulation_steps * args.world_size),
            "optimizer": f"{args.optim}, learning rate {args.learning_rate}, weight decay {args.weight_decay}",
            "learning rate schedule": str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)),
            "seed": str(args.seed),
            "versions": f"torch {environment['torch']}, transformers {environment['transformers']}",
            "hardware": environment["hardware"],
        },
        dataset=data_args.dataset_name,
        accuracy=metrics["after"]["top1"],
        measured_on=f"{environment['hardware']}, float32, batch 64, {environment['date']}",
        base_model=model_args.model_name_or_path,
        pictures=pictures,
    )


def _classify_one(output_dir: Path, validation) -> None:
    image, label = validation[0]["image"], validation.features["label"].names[validation[0]["label"]]
    answer = transformers.pipeline("image-classification", model=str(output_dir))(image.convert("RGB"))[0]
    print(f'pipeline("image-classification", model="{output_dir}"): {answer["label"]} ({answer["score"]:.3f}); truth: {label}')
