"""What the training program writes and prints: metrics, plots, the model card, the table before and after."""

import contextlib
import json
import tempfile
from pathlib import Path

import datasets
import torch
from transformers import AutoModel, Trainer, pipeline

from ..data.decoding import UnreadableImageError, decode_image
from ..evaluation.accounting import summarize
from ..evaluation.plotting import plot_layer_entropies, plot_training
from ..evaluation.throughput import describe_environment, images_per_second
from ..hub.facts import comparison_rows, hub_base_model, model_size
from ..models.pretrained_model import LambdaPreTrainedModel
from .callback import EntropyGuidedRemovalCallback


BATCH_SIZE = 64


def write_report(
    trainer: Trainer,
    base: LambdaPreTrainedModel,
    removal: EntropyGuidedRemovalCallback,
    base_scores: dict[str, float],
    scores: dict[str, float],
    dataset: str | None = None,
    base_model: str | None = None,
    unreadable: dict[str, int] | None = None,
    objective: str | None = None,
) -> dict:
    """
    Write `metrics.json`, `selection.json`, the pictures and the model card into the Trainer's output folder, and print
    the table. Speed is measured here, base and removed model side by side.

    Args:
        trainer (`Trainer`): after training; its model is the removed one and is saved in its output folder.
        base ([`LambdaPreTrainedModel`]): the model before removal.
        removal ([`EntropyGuidedRemovalCallback`]): knows the layers removed and why, and writes the card.
        base_scores, scores (`dict[str, float]`):
            On the validation split, before and after: `top1`; or `image_cosine` and `patch_cosine`.
        dataset (`str`, *optional*): name or Hub id of the dataset, for the card.
        base_model (`str`, *optional*): checkpoint started from; the card names it if it came from the Hub.
        unreadable (`dict[str, int]`, *optional*): images of each split that could not be decoded.
        objective (`str`, *optional*): for the card, see [`ModelCardFacts`].

    Returns:
        The contents of `metrics.json`.
    """
    model, selection, output_dir = trainer.model, removal.selection, Path(trainer.args.output_dir)
    metrics = _measure(model, base.to(model.device), output_dir, base_scores, scores)
    metrics["layers"] = selection.layers
    metrics["unreadable_images"] = unreadable or {}
    if trainer.args.bf16 or trainer.args.fp16:
        # accelerate has put autocast around the model's forward.
        metrics["environment"]["dtype"] += f", {'bfloat16' if trainer.args.bf16 else 'float16'} autocast"
    (output_dir / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    selection.save(output_dir / "selection.json")
    pictures = {"training": "training.png"}
    score = "accuracy" if "top1" in scores else next(iter(scores))
    plot_training(trainer.state.log_history, output_dir / "training.png", next(iter(base_scores.values())), score)
    if selection.mlp_entropy:
        pictures["entropy"] = "entropy.png"
        if "pictures" not in removal.facts:  # else drawn when the layers were chosen
            plot_layer_entropies(selection, output_dir / "entropy.png")
    rows = comparison_rows(metrics)
    environment = metrics["environment"]
    removal.write_card(
        trainer.args,
        trainer.state,
        model,
        rows=rows,
        dataset=dataset,
        split="validation",
        accuracy=scores.get("top1"),
        objective=objective,
        measured_on=f"{environment['hardware']}, {environment['dtype']}, batch {BATCH_SIZE}, {environment['date']}",
        base_model=base_model and hub_base_model(model.config),
        pictures=pictures,
    )
    print(f"\n{summarize(model)}\n\n{text_table(rows)}")
    for split, count in metrics["unreadable_images"].items():
        if count:
            print(f"images of {split} that could not be decoded and were left out: {count}")
    removed = f"layers {selection.layers}, chosen by {selection.strategy}" if selection.layers else "none"
    print(f"attention removed: {removed}")
    return metrics


def _measure(model, base, output_dir: Path, base_scores: dict, scores: dict) -> dict:
    size = model.config.image_size
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    pixel_values = torch.randn(BATCH_SIZE, model.config.num_channels, height, width, device=model.device)
    speed = images_per_second({"before": base, "after": model}, pixel_values.to(model.dtype))
    with tempfile.TemporaryDirectory() as folder:
        base.save_pretrained(folder)
        base_bytes = _weights_bytes(Path(folder))

    def figures(one, scores, file_bytes, name):
        return {**scores, **model_size(one), "file_bytes": file_bytes, "images_per_second": speed[name]}

    return {
        "before": figures(base, base_scores, base_bytes, "before"),
        "after": figures(model, scores, _weights_bytes(output_dir), "after"),
        "environment": {**describe_environment(model.device), "dtype": str(model.dtype).removeprefix("torch.")},
    }


def _weights_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def text_table(rows: dict[str, tuple[str, str]]) -> str:
    """The before / after table for a terminal."""
    lines = {"": ("before", "after"), **rows}
    return "\n".join(f"{name:<20}{before:>16}{after:>16}" for name, (before, after) in lines.items())


def classify_one(folder: Path, dataset) -> None:
    """Print what `pipeline("image-classification")` makes of a dataset's first image with the model in `folder`."""
    image, label = _first_image(dataset)
    answer = pipeline("image-classification", model=str(folder))(image)[0]
    print(f'pipeline("image-classification", model="{folder}"): {answer["label"]} ({answer["score"]:.3f})')
    print(f"truth: {dataset.features['label'].names[label]}")


def open_encoder(folder: Path, dataset=None) -> None:
    """Print what `AutoModel` makes of the encoder in `folder`."""
    width = AutoModel.from_pretrained(folder).config.hidden_size
    print(f'AutoModel.from_pretrained("{folder}"): {width} features for an image, and for each of its patches')


def _first_image(dataset):
    """Image and label of the first row that can be decoded; there is one, or there were no accuracy to report."""
    for row in dataset.cast_column("image", datasets.Image(decode=False)):
        with contextlib.suppress(UnreadableImageError):  # counted and named when it was evaluated
            return decode_image(row["image"]), row["label"]
    raise ValueError("The dataset has no readable image.")
