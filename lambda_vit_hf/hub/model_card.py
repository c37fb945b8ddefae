"""The model card of a removed model: measured facts in, Markdown with Hub metadata out. Unknown facts are left out."""

import html
import json
import re
from importlib import resources
from pathlib import Path

from huggingface_hub import EvalResult, ModelCardData
from jinja2 import Environment, StrictUndefined

from ..evaluation.throughput import markdown_table
from ..selection.output_change import AGREEMENTS, DIVERGENCES
from .card_sections import update_card
from .facts import ModelCardFacts


_FEATURES = "image-feature-extraction"  # the task of an encoder on the Hub


def _plain(text: object) -> str:
    """One line of Markdown that shows a text as it is: names come from users, and from files of others."""
    text = html.escape(_one_line(text), quote=False)
    return _MARKUP.sub(lambda found: f"\\{found[0]}", text)


def _code(text: object) -> str:
    """The same as code, where nothing but a backtick has a meaning."""
    return f"`{_one_line(text).replace('`', chr(39))}`"


def _one_line(text: object) -> str:
    """Without line breaks, and without characters that are no text: of terminals, of direction, halves of others."""
    return _NO_TEXT.sub("\N{REPLACEMENT CHARACTER}", " ".join(str(text).splitlines()))


def _table(header: list[str], values: dict[str, object]) -> str:
    return values and markdown_table(header, [[_plain(name), _plain(value)] for name, value in values.items()])


_NO_TEXT = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
# An underscore within a word is none; a bar is for the table to escape.
_MARKUP = re.compile(r"[\\`*\[\]~$]|(?<!\w)_|_(?!\w)|^[#+-]")


def _selection_text(facts: ModelCardFacts) -> str:
    selection, what = facts.selection, "To be removed" if facts.progress else "Removed"
    if facts.linear_maps:
        return (
            f"A linear map of each token and of the mean of all took the place of the attention of layers"
            f" {facts.linear_maps} (0-based) before this training."
        )
    if not selection.layers:
        return "No attention was removed in this training."
    if not selection.steps:
        chosen = _code(selection.strategy)
        return f"{what}: the attention of layers {selection.layers} (0-based). The layers were {chosen}."
    path = ", ".join(f"{step.picked} ({step.transfer_entropy[step.picked]:+.3f})" for step in selection.steps)
    return (
        f"{what}: the attention of layers {selection.layers} (0-based) of {len(selection.mlp_entropy)}."
        f" Chosen by {_code(selection.strategy)} on {selection.num_images} images: at each step the layer whose"
        f" removal changes the entropy of the {selection.output.replace('_', ' ')} least ({selection.mask} mask,"
        f" compared by {selection.compare}). In the order picked, with the set's transfer entropy in nats: {path}."
    )


def _changes_table(facts: ModelCardFacts) -> str:
    """What masking the layers changed before any training, one more in each row; empty where nobody measured it."""
    order, changes = facts.selection.order, facts.selection.changes
    if not changes:
        return ""
    kind = changes[0].kind
    agreement = AGREEMENTS.get(kind)
    header = ["masked", "last added", DIVERGENCES[kind], *([agreement] if agreement else [])]
    rows = [
        [number, layer, f"{change.divergence:.3f}", *([f"{100 * change.agreement:.1f} %"] if agreement else [])]
        for number, (layer, change) in enumerate(zip(order, changes, strict=True), 1)
    ]
    return markdown_table(header, rows)


def _merging_text(facts: ModelCardFacts) -> str:
    numbers = [number for number in facts.merged_tokens if number]
    if not numbers:
        return ""
    wanted = f"{numbers[0]} of them" if len(set(numbers)) == 1 else f"{min(numbers)} to {max(numbers)} of them"
    blocks = [layer for layer, number in enumerate(facts.merged_tokens) if number]
    return (
        f" Tokens merge: in layers {blocks} (0-based) the pairs of an image's tokens that are most alike become one"
        f" token each, {wanted} in a layer ([ToMe](https://arxiv.org/abs/2210.09461))."
    )


def _introduction(facts: ModelCardFacts) -> str:
    layers = len(facts.selection.layers)
    chosen = "Entropy chose the layers (NOSE). " if facts.selection.strategy == "nose" else ""
    method = "[MLP Can Be A Good Transformer Learner](https://arxiv.org/abs/2404.05657)"
    if facts.progress:
        return (
            f"**Not finished**: a checkpoint of a training that takes the attention out of {layers} layers"
            f" ({_plain(facts.progress)}). The attention is still in this model. {chosen}Method: {method}."
        )
    if facts.linear_maps:
        return (
            f"A vision transformer with linear maps in the place of the attention in {len(facts.linear_maps)} of its"
            f" layers, trained on afterwards. Made by lambda-vit-hf, after the method {method}."
        )
    fade = "into the identity" if facts.fade_to == "identity" else "out"
    folded = " and the identity was folded into the weights that follow" if facts.folded else ""
    return (
        f"A vision transformer without attention in {layers} of its layers. {chosen}They faded {fade}"
        f" {facts.objective or 'during fine-tuning'}, then their weights were removed{folded}. Method: {method}."
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
        pipeline_tag="image-classification" if facts.is_classifier else _FEATURES if facts.objective else None,
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
    rows = [[_plain(cell) for cell in (name, *values)] for name, values in facts.rows.items()]
    template = resources.files("lambda_vit_hf.model_cards").joinpath("model_card.md.jinja").read_text("utf-8")
    body = Environment(undefined=StrictUndefined, autoescape=False, trim_blocks=True).from_string(template).render(
        title=_plain(facts.name),
        introduction=_introduction(facts) + _merging_text(facts),
        comparison_table=rows and markdown_table(["", "before", "after"], rows),
        measured_on=facts.measured_on and _plain(facts.measured_on),
        evaluation_table=_table(["metric", "value"], facts.evaluation),
        removal_heading=f"Which attention layers {'are to be' if facts.progress else 'were'} removed, and why",
        selection_text=_selection_text(facts),
        changes_table=_changes_table(facts),
        entropy_picture=facts.pictures.get("entropy"),
        training_picture=facts.pictures.get("training"),
        is_classifier=facts.is_classifier,
        model_id=json.dumps(facts.repo_id or facts.name),
        training_table=_table(["", ""], facts.training),
        limits=(
            "The layers were chosen on this model's training images and may not suit another task. Images far from"
            " the training data were not tested."
        ),
    )  # fmt: skip
    path = Path(folder) / "README.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    update_card(path, card_metadata(facts).to_dict(), body)
    return path
