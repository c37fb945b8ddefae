"""What a model card says, and where it is known from: the model, and the state of its training."""

import re
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError

from ..evaluation.accounting import count_macs, count_parameters
from ..evaluation.throughput import describe_environment
from ..models.pretrained_model import LambdaPreTrainedModel
from ..selection.select import AttentionSelection


_NO_METRIC = re.compile("eval_(runtime|.*_per_second|model_preparation_time)$")
_ROWS = {
    "top-1": ("top1", lambda value: f"{100 * value:.2f} %"),
    "image features, cosine": ("image_cosine", lambda value: f"{value:.4f}"),
    "patch features, cosine": ("patch_cosine", lambda value: f"{value:.4f}"),
    "parameters": ("parameters", lambda value: f"{value:,}"),
    "MACs per image": ("macs", lambda value: f"{value / 1e6:,.2f} M"),
    "file size": ("file_bytes", lambda value: f"{value / 1e6:.3f} MB"),
    "images/s (median)": ("images_per_second", lambda value: f"{value:,.0f}"),
}


@dataclass
class ModelCardFacts:
    """
    What a card says. Everything is measured or configured, nothing is filled in.

    Attributes:
        name: of the model.
        rows: before / after table: row name to (before, after), as printed.
        selection: which layers, and the search.
        training: hyperparameters, versions and hardware: name to value.
        evaluation: metrics of the removed model: name to value.
        dataset: Hub id or name of the training data, or several.
        split: of the dataset that `accuracy` was measured on.
        accuracy: top-1 of the removed model, in [0, 1]. Without a single dataset it makes no result in the metadata.
        measured_on: hardware, versions, date of the speed figures.
        base_model: Hub id of the checkpoint started from.
        license, language: of the weights.
        fade_to: what attention faded to: `"identity"`, or nothing, `"skip"`.
        linear_maps: layers, 0-based, in which a linear map took the place of attention before this training.
        merged_tokens: how many pairs of tokens become one in each layer; empty where none do.
        folded: whether the removed layers' identity is in the weights that follow.
        pictures: file names in the model's folder, keys `entropy` and `training`.
        repo_id: where the usage example finds the model; by default its name.
        is_classifier: whether it is for `pipeline("image-classification")`.
        tags: more of them.
        progress: how far training is, where the model is not finished.
        objective: what was trained for while attention faded, if not for classes: "while ...".
    """

    name: str
    rows: dict[str, tuple[str, str]]
    selection: AttentionSelection
    training: dict[str, str] = field(default_factory=dict)
    evaluation: dict[str, str] = field(default_factory=dict)
    dataset: str | list[str] | None = None
    split: str | None = None
    accuracy: float | None = None
    measured_on: str | None = None
    base_model: str | None = None
    license: str | None = None
    language: str | list[str] | None = None
    fade_to: str = "identity"
    linear_maps: list[int] = field(default_factory=list)
    merged_tokens: list[int] = field(default_factory=list)
    folded: bool = False
    pictures: dict[str, str] = field(default_factory=dict)
    repo_id: str | None = None
    is_classifier: bool = True
    tags: list[str] = field(default_factory=list)
    progress: str | None = None
    objective: str | None = None


def facts_of_training(
    args,
    state,
    model: LambdaPreTrainedModel,
    selection: AttentionSelection,
    size_before: dict | None = None,
    lambda_schedule: str | None = None,
    **known,
) -> ModelCardFacts:
    """
    What the Trainer's arguments and state and the model tell by themselves, and the `known` facts, which go first.
    `size_before` is the [`model_size`] before removal.
    """
    waiting = [model.attention_lambdas[layer] for layer in selection.layers if layer in model.config.kept_layers]
    metrics = {} if waiting else final_evaluation(args, state)
    sizes = {"before": size_before, "after": model_size(model)}
    facts = {
        "name": (args.hub_model_id or "").split("/")[-1] or Path(args.output_dir).resolve().name,
        "rows": {} if waiting or size_before is None else comparison_rows(sizes),
        "progress": f"step {state.global_step} of {state.max_steps}, lambda = {max(waiting):.3f}" if waiting else None,
        "training": _training_rows(args, state, lambda_schedule, describe_environment(model.device)),
        "evaluation": {name.removeprefix("eval_"): f"{value:.4f}" for name, value in metrics.items()},
        "accuracy": metrics.get("eval_accuracy"),
        "repo_id": args.hub_model_id,
        **facts_of_model(model),
    }
    return ModelCardFacts(selection=selection, **{**facts, **known})


def facts_of_model(model: LambdaPreTrainedModel) -> dict:
    """What a model tells by itself, whoever trained it."""
    config = model.config
    return {
        "base_model": hub_base_model(config),
        "fade_to": config.fade_to,
        "linear_maps": config.removed_layers if config.fade_to == "linear" else [],
        "merged_tokens": config.token_merging_schedule(),
        "folded": config.fold_removed,
        "is_classifier": model.has_class_head,
    }


def final_evaluation(args, state) -> dict[str, float]:
    """Metrics of the weights that training left, by the Trainer's log: those of other weights are none of the card."""
    step, is_after_training = state.global_step, True
    if args.load_best_model_at_end and state.best_global_step is not None:
        step = state.best_global_step
    for entry in reversed(state.log_history):
        is_after_training = is_after_training and "train_runtime" not in entry
        metrics = _metrics_of(entry)
        if metrics and entry.get("lambda") == 0 and (is_after_training or entry["step"] == step):
            return metrics
    return {}


def last_evaluation(state) -> dict[str, float]:
    """Metrics of the last evaluation in the Trainer's log, of whatever weights."""
    return next(filter(None, map(_metrics_of, reversed(state.log_history))), {})


def _metrics_of(entry: dict) -> dict[str, float]:
    metrics = {k: v for k, v in entry.items() if k.startswith("eval_") and not _NO_METRIC.match(k)}
    return {name: value for name, value in metrics.items() if isinstance(value, (int, float))}


def hub_base_model(config) -> str | None:
    """Hub id of the checkpoint a model came from, by the cache of the Hub's files; `None` if it was a folder."""
    name = config._name_or_path
    try:
        is_of_hub = name and not Path(name).exists() and isinstance(try_to_load_from_cache(name, "config.json"), str)
    except HFValidationError:
        return None
    return name if is_of_hub else None


def model_size(model: LambdaPreTrainedModel) -> dict[str, int]:
    """Parameters, and multiply-accumulates per image."""
    labels = model.config.num_labels if model.has_class_head else 0
    return {"parameters": count_parameters(model), "macs": count_macs(model.config, labels)}


def comparison_rows(metrics: dict) -> dict[str, tuple[str, str]]:
    """Rows of the before / after table, as printed, of what was measured, from the contents of `metrics.json`."""
    before, after = metrics["before"], metrics["after"]
    return {row: (form(before[name]), form(after[name])) for row, (name, form) in _ROWS.items() if name in before}


def _training_rows(args, state, lambda_schedule: str | None, environment: dict[str, str]) -> dict[str, str]:
    rate = str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type))
    # Of LambdaTrainingArguments; the plain Trainer's have neither.
    floor, decay = getattr(args, "min_learning_rate", None), getattr(args, "ema_decay", None)
    return {
        "epochs": f"{state.epoch or 0:.4g}",
        "optimizer steps": str(state.global_step),
        **({"lambda schedule": lambda_schedule} if lambda_schedule else {}),
        "global batch size": str(args.train_batch_size * args.gradient_accumulation_steps * args.world_size),
        "optimizer": f"{getattr(args.optim, 'value', args.optim)}, learning rate {args.learning_rate}, weight decay"
        f" {args.weight_decay}",
        "learning rate schedule": rate if floor is None else f"cosine (timm's), down to {floor}",
        **({"weights": f"average over training (EMA, decay {decay})"} if decay else {}),
        "seed": str(args.seed),
        "versions": f"torch {environment['torch']}, transformers {environment['transformers']}",
        "hardware": environment["hardware"],
    }
