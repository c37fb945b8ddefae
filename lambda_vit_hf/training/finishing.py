"""From a checkpoint at lambda = 0 to the finished model: without the attention that is off, folded, with its card."""

from dataclasses import dataclass
from pathlib import Path

import transformers
from safetensors.torch import load_file
from transformers import AutoImageProcessor

from ..hub.facts import ModelCardFacts, comparison_rows, facts_of_model, final_evaluation, model_size
from ..hub.model_card import write_model_card
from ..models.checksums import check_checksums, write_checksums
from ..models.families import load_as_saved
from ..models.finite import check_finite
from ..models.pretrained_model import LambdaPreTrainedModel
from ..selection.select import AttentionSelection
from .checkpoints import EMA_FILE, damage_named
from .dilution import DilutionConfig, DilutionSchedule
from .removal import AttentionRemoval


_NOTE = """# A checkpoint, not a finished model

Attention layers {layers} are off here (lambda = 0), but their weights are still in the file, for training to go on.
To write the finished model, without them{folded}:

    lambda-vit finish {checkpoint}
"""


def tell_how_to_finish(checkpoint: Path, removal: AttentionRemoval, model: LambdaPreTrainedModel) -> None:
    """Write a README.md into the folder of a checkpoint at lambda = 0."""
    if checkpoint.is_dir() and not removal.is_diluting(model):
        folded = " and folded" if removal.dilution_config.fold and model.config.fade_to == "identity" else ""
        note = _NOTE.format(layers=removal.selection.layers, folded=folded, checkpoint=checkpoint.name)
        (checkpoint / "README.md").write_text(note, encoding="utf-8")


def finish_checkpoint(checkpoint: str | Path, output_dir: str | Path) -> Path:
    """
    Write the finished model of a Trainer's checkpoint at lambda = 0: layers removed, folded if training would have
    folded, the average of the weights where one was kept; image processor, `selection.json` and model card with it.

    Args:
        checkpoint (`str` or `Path`): a folder `checkpoint-N` of a training with [`EntropyGuidedRemovalCallback`].
        output_dir (`str` or `Path`): a new or empty folder.

    Returns:
        `output_dir` as a path.

    Raises:
        FileExistsError: if the output folder is not empty.
        FileNotFoundError: if the checkpoint is not there or has no `trainer_state.json`.
        ValueError: if it is of another training, or lambda is above 0.
        OSError: if one of its files is damaged, or they do not belong together.
        FloatingPointError: if the model has NaN or infinity in its weights, or in its answers.
    """
    checkpoint, output_dir = Path(checkpoint), Path(output_dir)
    if output_dir.exists() and (not output_dir.is_dir() or any(output_dir.iterdir())):
        raise FileExistsError(f"{output_dir} is not empty: the finished model needs a folder of its own.")
    check_checksums(checkpoint)
    run = _read_run(checkpoint)
    selection, model = run.selection, load_as_saved(checkpoint)
    lambdas = model.attention_lambdas
    others = [value for layer, value in enumerate(lambdas) if layer not in selection.layers]
    if len(others) + len(selection.layers) != len(lambdas) or any(value not in (None, 1.0) for value in others):
        raise OSError(
            f"{checkpoint} is damaged: trainer_state.json says that layers {selection.layers} lose their attention,"
            f" but lambda in the weights is, by layer, {lambdas}. Take another checkpoint."
        )
    diluting = {layer: lambdas[layer] for layer in selection.layers if lambdas[layer]}
    if diluting:
        raise ValueError(
            f"{checkpoint} is not at lambda = 0, but at {diluting}: resume its training, or take a later checkpoint."
        )
    _take_average(model, checkpoint, run)
    size_before = model_size(model)
    left = [layer for layer in selection.layers if lambdas[layer] is not None]
    model.remove_attention(left)
    if run.fold and left:
        model.fold_removed_attention()
    check_finite(model, f"The model of {checkpoint}")
    model.save_pretrained(output_dir)
    if (checkpoint / "preprocessor_config.json").is_file():
        AutoImageProcessor.from_pretrained(checkpoint).save_pretrained(output_dir)
    selection.save(output_dir / "selection.json")
    write_model_card(output_dir, _facts(output_dir, model, size_before, run))
    write_checksums(output_dir)
    return output_dir


class _Arguments:
    load_best_model_at_end = False  # the checkpoint is the one that is asked for


@dataclass
class _Run:
    """What a checkpoint says of its training, in types that can be relied on."""

    selection: AttentionSelection
    fold: bool
    training: dict[str, str]
    metrics: dict[str, float]
    is_averaged: bool


def _read_run(checkpoint: Path) -> _Run:
    path = checkpoint / "trainer_state.json"
    if not path.is_file():
        raise FileNotFoundError(f"{checkpoint} is no whole checkpoint of a Trainer: there is no {path.name}.")
    with damage_named(str(path)):
        state = transformers.TrainerState.load_from_json(str(path))
        saved, average = (state.stateful_callbacks.get(f"{name}Callback") for name in ("EntropyGuidedRemoval", "Ema"))
        run = saved["attributes"]["checkpointed_run"] if saved else {}
        chosen = run.get("selection")
    if not chosen:
        raise ValueError(f"{checkpoint} was written without EntropyGuidedRemovalCallback: nothing is to be removed.")
    with damage_named(str(path)):
        schedule, options = DilutionSchedule(**run["dilution"]), saved["args"].get("dilution", saved["args"])
        is_evaluated = average is None or average["args"]["use_for_evaluation"]
        return _Run(
            AttentionSelection.from_dict(chosen),
            DilutionConfig(fold=options["fold"]).fold,
            {
                "epochs": f"{state.epoch or 0:.4g}",
                "optimizer steps": f"{state.global_step} of {state.max_steps}",
                "lambda schedule": f"{schedule.shape}, last {schedule.hold_share:.0%} of training at 0",
            },
            final_evaluation(_Arguments, state) if is_evaluated else {},
            average is not None,
        )


def _take_average(model, checkpoint: Path, run: _Run) -> None:
    """Put the checkpoint's average into the model, if it keeps one."""
    path = checkpoint / EMA_FILE
    if path.is_file() != run.is_averaged:
        is_there = "is there, but trainer_state.json knows nothing of it" if path.is_file() else "is missing"
        raise FileNotFoundError(f"{path} {is_there}: the average that training would have shipped.")
    if run.is_averaged:
        model.load_state_dict(load_file(path))


def _facts(output_dir, model, size_before, run: _Run) -> ModelCardFacts:
    return ModelCardFacts(
        name=output_dir.resolve().name,
        rows=comparison_rows({"before": size_before, "after": model_size(model)}),
        selection=run.selection,
        training=run.training,
        evaluation={name.removeprefix("eval_"): f"{value:.4f}" for name, value in run.metrics.items()},
        accuracy=run.metrics.get("eval_accuracy"),
        **facts_of_model(model),
    )
