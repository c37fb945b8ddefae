"""The model card of a removed model: measured facts in, Markdown with Hub metadata out. Unknown facts are left out."""

import json
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from jinja2 import Environment, StrictUndefined

from .selection import AttentionSelection


@dataclass
class ModelCardFacts:
    """
    What a card says. Everything is measured or configured, nothing is filled in.

    Attributes:
        name: of the model; also its default repo id in the usage example.
        rows: before / after table: row name to (before, after), as printed.
        selection: which layers, and the search.
        training: hyperparameters, versions and hardware: name to value.
        dataset: Hub id or name of the training data.
        accuracy: top-1 of the removed model on the validation split, in [0, 1].
        measured_on: hardware, versions, date of the speed figures.
        base_model: Hub id of the checkpoint started from.
        license: of the weights.
        folded: whether the removed layers' identity is in the weights that follow.
        pictures: file names in the model's folder, keys `entropy` and `training`.
    """

    name: str
    rows: dict[str, tuple[str, str]]
    selection: AttentionSelection
    training: dict[str, str] = field(default_factory=dict)
    dataset: str | None = None
    accuracy: float | None = None
    measured_on: str | None = None
    base_model: str | None = None
    license: str | None = None
    folded: bool = False
    pictures: dict[str, str] = field(default_factory=dict)


def _one_line(text: str) -> str:
    """Names come from users: a line break in one must not start a heading or a metadata block."""
    return " ".join(text.splitlines())


def markdown_table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table; cells are escaped so that names with `|` or line breaks stay in their cell."""

    def line(cells):
        return "| " + " | ".join(_one_line(str(cell)).replace("|", "\\|") for cell in cells) + " |"

    return "\n".join([line(header), line(["---"] * len(header)), *map(line, rows)])


def _selection_text(selection: AttentionSelection) -> str:
    removed = f"Removed: the attention of layers {selection.layers} (0-based) of {len(selection.mlp_entropy)}."
    if not selection.steps:
        return (
            f"Removed: the attention of layers {selection.layers} (0-based). The layers were `{selection.strategy}`."
        )
    path = ", ".join(f"{step.picked} ({step.transfer_entropy[step.picked]:+.3f})" for step in selection.steps)
    return (
        f"{removed} Chosen by `{selection.strategy}` on {selection.num_images} images: at each step the layer whose"
        f" removal changes the entropy of the {selection.output.replace('_', ' ')} least ({selection.mask} mask,"
        f" compared by {selection.compare}). In the order picked, with the set's transfer entropy in nats: {path}."
    )


def card_metadata(facts: ModelCardFacts) -> ModelCardData:
    """The YAML block, as huggingface_hub defines it."""
    results = None
    if facts.accuracy is not None and facts.dataset is not None:
        results = [
            EvalResult(
                task_type="image-classification",
                dataset_type=facts.dataset,
                dataset_name=facts.dataset,
                dataset_split="validation",
                metric_type="accuracy",
                metric_name="top-1 accuracy",
                metric_value=facts.accuracy,
            )
        ]
    return ModelCardData(
        model_name=facts.name,
        license=facts.license,
        library_name="transformers",
        pipeline_tag="image-classification",
        base_model=facts.base_model,
        base_model_relation="finetune" if facts.base_model else None,
        datasets=[facts.dataset] if facts.dataset else None,
        tags=["lambda-vit", "vision", "pruning", "attention-removal"],
        eval_results=results,
    )


def write_model_card(folder: str | Path, facts: ModelCardFacts) -> Path:
    """Render `README.md` into a model's folder and return its path."""
    template = resources.files("lambda_vit_hf.model_cards").joinpath("model_card.md.jinja").read_text("utf-8")
    layers = len(facts.selection.layers)
    chosen = "Entropy chose the layers (NOSE). " if facts.selection.strategy == "nose" else ""
    folded = " and the identity was folded into the weights that follow" if facts.folded else ""
    body = Environment(undefined=StrictUndefined, autoescape=False, trim_blocks=True).from_string(template).render(
        title=_one_line(facts.name),
        introduction=(
            f"A vision transformer without attention in {layers} of its layers. {chosen}They faded into the identity"
            f" during fine-tuning, then their weights were removed{folded}. Method: [MLP Can Be A Good Transformer"
            " Learner](https://arxiv.org/abs/2404.05657)."
        ),
        comparison_table=markdown_table(["", "before", "after"], [[k, *v] for k, v in facts.rows.items()]),
        measured_on=facts.measured_on and _one_line(facts.measured_on),
        selection_text=_selection_text(facts.selection),
        entropy_picture=facts.pictures.get("entropy"),
        training_picture=facts.pictures.get("training"),
        model_id=json.dumps(facts.name),
        training_table=markdown_table(["", ""], [[k, v] for k, v in facts.training.items()]),
        limits=(
            "The layers were chosen on this model's training images and may not suit another task. Images far from"
            " the training data were not tested."
        ),
    )  # fmt: skip
    path = Path(folder) / "README.md"
    ModelCard(f"---\n{card_metadata(facts).to_yaml()}\n---\n\n{body}").save(path)
    return path
