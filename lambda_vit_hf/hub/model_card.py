"""The model card of a removed model: measured facts in, Markdown with Hub metadata out. Unknown facts are left out."""

import json
import logging
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path

from huggingface_hub import EvalResult, ModelCardData, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from jinja2 import Environment, StrictUndefined
from transformers import Trainer

from ..evaluation.accounting import count_macs, count_parameters
from ..evaluation.throughput import describe_environment, markdown_table
from ..models.modeling_lambda_vit import LambdaViTForImageClassification, LambdaViTPreTrainedModel
from ..selection.select import AttentionSelection
from .card_sections import update_card


logger = logging.getLogger(__name__)

_NO_METRIC = re.compile("eval_(runtime|.*_per_second|model_preparation_time)$")
_ROWS = {
    "top-1": ("top1", lambda value: f"{100 * value:.2f} %"),
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
        folded: whether the removed layers' identity is in the weights that follow.
        pictures: file names in the model's folder, keys `entropy` and `training`.
        repo_id: where the usage example finds the model; by default its name.
        is_classifier: whether it is for `pipeline("image-classification")`.
        tags: more of them.
        progress: how far training is, where the model is not finished.
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
    folded: bool = False
    pictures: dict[str, str] = field(default_factory=dict)
    repo_id: str | None = None
    is_classifier: bool = True
    tags: list[str] = field(default_factory=list)
    progress: str | None = None


def facts_of_training(
    args,
    state,
    model: LambdaViTPreTrainedModel,
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
        "base_model": hub_base_model(model.config),
        "folded": model.config.fold_removed,
        "repo_id": args.hub_model_id,
        "is_classifier": isinstance(model, LambdaViTForImageClassification),
    }
    return ModelCardFacts(selection=selection, **{**facts, **known})


def final_evaluation(args, state) -> dict[str, float]:
    """Metrics of the weights that training left, by the Trainer's log: those of other weights are none of the card."""
    step, is_after_training = state.global_step, True
    if args.load_best_model_at_end and state.best_global_step is not None:
        step = state.best_global_step
    for entry in reversed(state.log_history):
        is_after_training = is_after_training and "train_runtime" not in entry
        metrics = {k: v for k, v in entry.items() if k.startswith("eval_") and not _NO_METRIC.match(k)}
        if metrics and entry.get("lambda") == 0 and (is_after_training or entry["step"] == step):
            return {name: value for name, value in metrics.items() if isinstance(value, (int, float))}
    return {}


def hub_base_model(config) -> str | None:
    """Hub id of the checkpoint a model came from, by the cache of the Hub's files; `None` if it was a folder."""
    name = config._name_or_path
    try:
        is_of_hub = name and not Path(name).exists() and isinstance(try_to_load_from_cache(name, "config.json"), str)
    except HFValidationError:
        return None
    return name if is_of_hub else None


def model_size(model: LambdaViTPreTrainedModel) -> dict[str, int]:
    """Parameters, and multiply-accumulates per image."""
    labels = model.config.num_labels if hasattr(model, "classifier") else 0
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


def _one_line(text: str) -> str:
    """Names come from users: a line break in one must not start a heading or a metadata block."""
    return " ".join(text.splitlines())


def _selection_text(facts: ModelCardFacts) -> str:
    selection, what = facts.selection, "To be removed" if facts.progress else "Removed"
    if not selection.steps:
        return f"{what}: the attention of layers {selection.layers} (0-based). The layers were `{selection.strategy}`."
    path = ", ".join(f"{step.picked} ({step.transfer_entropy[step.picked]:+.3f})" for step in selection.steps)
    return (
        f"{what}: the attention of layers {selection.layers} (0-based) of {len(selection.mlp_entropy)}."
        f" Chosen by `{selection.strategy}` on {selection.num_images} images: at each step the layer whose"
        f" removal changes the entropy of the {selection.output.replace('_', ' ')} least ({selection.mask} mask,"
        f" compared by {selection.compare}). In the order picked, with the set's transfer entropy in nats: {path}."
    )


def _introduction(facts: ModelCardFacts) -> str:
    layers = len(facts.selection.layers)
    chosen = "Entropy chose the layers (NOSE). " if facts.selection.strategy == "nose" else ""
    method = "[MLP Can Be A Good Transformer Learner](https://arxiv.org/abs/2404.05657)"
    if facts.progress:
        return (
            f"**Not finished**: a checkpoint of a training that takes the attention out of {layers} layers"
            f" ({_one_line(facts.progress)}). The attention is still in this model. {chosen}Method: {method}."
        )
    folded = " and the identity was folded into the weights that follow" if facts.folded else ""
    return (
        f"A vision transformer without attention in {layers} of its layers. {chosen}They faded into the identity"
        f" during fine-tuning, then their weights were removed{folded}. Method: {method}."
    )


def card_metadata(facts: ModelCardFacts) -> ModelCardData:
    """The YAML block, as huggingface_hub defines it."""
    datasets = [facts.dataset] if isinstance(facts.dataset, str) else facts.dataset
    results = None
    if facts.accuracy is not None and datasets and len(datasets) == 1:
        results = [
            EvalResult(
                task_type="image-classification",
                dataset_type=datasets[0],
                dataset_name=datasets[0],
                dataset_split=facts.split,
                metric_type="accuracy",
                metric_name="top-1 accuracy",
                metric_value=facts.accuracy,
            )
        ]
    tags = ["lambda-vit", "vision", "pruning", "attention-removal", *(["training-in-progress"] * bool(facts.progress))]
    return ModelCardData(
        model_name=facts.name,
        language=facts.language,
        license=facts.license,
        library_name="transformers",
        pipeline_tag="image-classification" if facts.is_classifier else None,
        base_model=facts.base_model,
        base_model_relation="finetune" if facts.base_model else None,
        datasets=datasets,
        tags=list(dict.fromkeys([*tags, *facts.tags])),
        eval_results=results,
    )


def write_model_card(folder: str | Path, facts: ModelCardFacts) -> Path:
    """
    Write `README.md` into a model's folder, or our part of the one that is there, and return its path. The generic
    card that the Trainer writes is replaced.
    """
    rows = [[name, *values] for name, values in facts.rows.items()]
    template = resources.files("lambda_vit_hf.model_cards").joinpath("model_card.md.jinja").read_text("utf-8")
    body = Environment(undefined=StrictUndefined, autoescape=False, trim_blocks=True).from_string(template).render(
        title=_one_line(facts.name),
        introduction=_introduction(facts),
        comparison_table=rows and markdown_table(["", "before", "after"], rows),
        measured_on=facts.measured_on and _one_line(facts.measured_on),
        evaluation_table=facts.evaluation and markdown_table(["metric", "value"], list(facts.evaluation.items())),
        removal_heading=f"Which attention layers {'are to be' if facts.progress else 'were'} removed, and why",
        selection_text=_selection_text(facts),
        entropy_picture=facts.pictures.get("entropy"),
        training_picture=facts.pictures.get("training"),
        is_classifier=facts.is_classifier,
        model_id=json.dumps(facts.repo_id or facts.name),
        training_table=facts.training and markdown_table(["", ""], list(facts.training.items())),
        limits=(
            "The layers were chosen on this model's training images and may not suit another task. Images far from"
            " the training data were not tested."
        ),
    )  # fmt: skip
    path = Path(folder) / "README.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    update_card(path, card_metadata(facts).to_dict(), body)
    return path


def push_with_card(write_card: Callable) -> None:
    """
    Called in the event `on_push_begin`: `write_card()` now, and let the Trainer that is pushing call
    `write_card(**facts)` where it would write its generic card, whatever is there.

    It does so right before the upload, and tells its callbacks nothing in between. So the Trainer is looked up on the
    stack, and this one instance gets another `create_model_card`, as a subclass would have. A subclass with one of
    its own keeps it.
    """
    write_card()
    frame = sys._getframe(1)
    while frame is not None and not isinstance(frame.f_locals.get("self"), Trainer):
        frame = frame.f_back
    if frame is None or type(frame.f_locals["self"]).create_model_card is not Trainer.create_model_card:
        logger.warning("The Trainer writes a model card of its own; that of lambda-vit-hf is not pushed.")
        return
    trainer = frame.f_locals["self"]

    def create_model_card(
        language=None, license=None, tags=None, model_name=None, finetuned_from=None, tasks=None, dataset_tags=None,
        dataset=None, dataset_args=None,
    ):  # fmt: skip
        """Facts as [`Trainer.create_model_card`] takes them; `tasks` and `dataset_args` are not used."""
        facts = {
            "name": model_name, "language": language, "license": license, "base_model": finetuned_from,
            "tags": [tags] if isinstance(tags, str) else tags, "dataset": dataset_tags or dataset,
            "repo_id": trainer.hub_model_id,
        }  # fmt: skip
        write_card(**{name: value for name, value in facts.items() if value})

    trainer.create_model_card = create_model_card
