"""From a checkpoint at lambda = 0 to the finished model."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoImageProcessor, AutoModelForImageClassification, ViTImageProcessor

from lambda_vit_hf import EmaCallback, EntropyGuidedRemovalCallback, finish_checkpoint
from lambda_vit_hf.hub.push import check_folder
from lambda_vit_hf.models.checksums import MANIFEST, find_damage, remove_checksums
from lambda_vit_hf.selection.select import AttentionSelection
from tests.small_training import make_trainer


def train(model, folder, callbacks=(), **options):
    settings = dict(save_strategy="steps", save_steps=6, eval_strategy="steps", eval_steps=6) | options
    how = {name: settings.pop(name) for name in ("fold", "fade_to") if name in settings}
    removal = EntropyGuidedRemovalCallback(num_removed_layers=2, **how)
    trainer = make_trainer(model, folder, [*callbacks, removal], **settings)
    trainer.processing_class = ViTImageProcessor(size={"height": 16, "width": 16})
    trainer.train()
    return trainer


@pytest.mark.parametrize(
    ("averaged", "fold", "fade_to"),
    [(False, True, "identity"), (True, True, "identity"), (True, False, "identity"), (True, True, "skip")],
)
def test_the_last_checkpoint_is_finished_to_what_training_left(model, tmp_path, averaged, fold, fade_to):
    trainer = train(model, tmp_path, [EmaCallback(0.9)] if averaged else [], fold=fold, fade_to=fade_to)
    finished = finish_checkpoint(tmp_path / "checkpoint-12", tmp_path / "finished")
    restored = AutoModelForImageClassification.from_pretrained(finished)
    assert restored.config.removed_layers == model.config.removed_layers
    assert restored.config.fade_to == fade_to
    assert restored.config.fold_removed == (fold and fade_to == "identity")
    expected = model.state_dict()
    assert restored.state_dict().keys() == expected.keys()
    assert [name for name, value in restored.state_dict().items() if not torch.equal(value, expected[name])] == []
    assert AutoImageProcessor.from_pretrained(finished).size.height == 16
    assert AttentionSelection.load(finished / "selection.json").layers == model.config.removed_layers
    card = (finished / "README.md").read_text()
    accuracy = [entry["eval_accuracy"] for entry in trainer.state.log_history if "eval_accuracy" in entry][-1]
    assert f"| accuracy | {accuracy:.4f} |" in card
    assert "12 of 12" in card and "Not finished" not in card
    assert ("faded into the identity" in card) == (fade_to == "identity")
    assert ("folded into the weights" in card) == restored.config.fold_removed
    assert check_folder(finished)


def test_a_checkpoint_at_lambda_0_says_how_to_finish_it(model, tmp_path):
    train(model, tmp_path)
    note = (tmp_path / "checkpoint-12" / "README.md").read_text()
    assert "lambda-vit finish checkpoint-12" in note and f"{model.config.removed_layers}" in note
    assert not (tmp_path / "checkpoint-6" / "README.md").exists()


def test_a_checkpoint_that_is_half_way_is_refused(model, tmp_path):
    train(model, tmp_path)
    with pytest.raises(ValueError, match="not at lambda = 0"):
        finish_checkpoint(tmp_path / "checkpoint-6", tmp_path / "finished")
    assert not (tmp_path / "finished").exists()


def test_what_is_no_checkpoint_of_a_removal_is_refused(model, tmp_path):
    train(model, tmp_path)
    checkpoint, output = tmp_path / "checkpoint-12", tmp_path / "finished"
    with pytest.raises(FileExistsError, match="not empty"):
        finish_checkpoint(checkpoint, tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no trainer_state\.json"):
        finish_checkpoint(tmp_path / "nowhere", output)
    remove_checksums(checkpoint)  # as an older version left it
    state = checkpoint / "trainer_state.json"
    content = state.read_text()
    state.write_text(content[:-20])
    with pytest.raises(OSError, match="damaged"):
        finish_checkpoint(checkpoint, output)
    state.write_text(json.dumps({**json.loads(content), "stateful_callbacks": {}}))
    with pytest.raises(ValueError, match="without EntropyGuidedRemovalCallback"):
        finish_checkpoint(checkpoint, output)
    state.write_text(content)
    weights = checkpoint / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(OSError, match="damaged"):
        finish_checkpoint(checkpoint, output)
    assert not output.exists()


def test_a_checkpoint_that_lost_its_average_is_refused(model, tmp_path):
    train(model, tmp_path, [EmaCallback(0.9)])
    remove_checksums(tmp_path / "checkpoint-12")
    (tmp_path / "checkpoint-12" / "ema.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"ema\.safetensors is missing"):
        finish_checkpoint(tmp_path / "checkpoint-12", tmp_path / "finished")


def test_a_checkpoint_with_a_flipped_bit_is_refused_by_name(model, tmp_path):
    train(model, tmp_path)
    checkpoint, output = tmp_path / "checkpoint-12", tmp_path / "finished"
    listed = [line.split()[1] for line in (checkpoint / MANIFEST).read_text().splitlines()]
    assert {"config.json", "model.safetensors", "optimizer.pt", "trainer_state.json"} <= set(listed)
    for name in listed:
        whole = (checkpoint / name).read_bytes()
        (checkpoint / name).write_bytes(whole[:-3] + bytes([whole[-3] ^ 1]) + whole[-2:])
        with pytest.raises(OSError, match=name):
            finish_checkpoint(checkpoint, output)
        (checkpoint / name).write_bytes(whole)
    assert not output.exists()
    finish_checkpoint(checkpoint, output)
    assert (output / MANIFEST).is_file() and find_damage(output) is None


@pytest.mark.parametrize(("value", "message"), [(torch.nan, "weights .* hold NaN"), (3e38, "gives NaN or infinity")])
def test_a_model_that_answers_in_no_numbers_is_not_finished(model, tmp_path, value, message):
    train(model, tmp_path, [EmaCallback(0.9)])
    checkpoint = tmp_path / "checkpoint-12"
    remove_checksums(checkpoint)
    average = load_file(checkpoint / "ema.safetensors")
    average["vit.layers.1.mlp.fc1.weight"][:] = value
    save_file(average, checkpoint / "ema.safetensors", metadata={"format": "pt", "global_step": "12"})
    with pytest.raises(FloatingPointError, match=message):
        finish_checkpoint(checkpoint, tmp_path / "finished")
    assert not (tmp_path / "finished").exists()


def changed(values, path: str, value):
    """JSON with another value at a dotted path."""
    first, _, rest = path.partition(".")
    return {**values, first: changed(values[first], rest, value) if rest else value}


def test_a_damaged_state_is_refused_by_name_also_without_checksums(model, tmp_path):
    train(model, tmp_path, [EmaCallback(0.9)])
    checkpoint, output = tmp_path / "checkpoint-12", tmp_path / "finished"
    remove_checksums(checkpoint)
    state = checkpoint / "trainer_state.json"
    whole = json.loads(state.read_text())
    removal = "stateful_callbacks.EntropyGuidedRemovalCallback"
    run = f"{removal}.attributes.checkpointed_run"
    layer = model.config.removed_layers[0]
    shorter = AttentionSelection([layer]).to_dict()
    damages = [
        ("epoch", [0]), ("log_history", 7), ("stateful_callbacks", "x"), (f"{removal}.args.dilution", []),
        (f"{removal}.args.dilution.fold", None), (f"{removal}.attributes", None), (run, 1.5),
        (f"{run}.dilution", {}), (f"{run}.dilution.hold_share", "x"), (f"{run}.selection.order", []),
        (f"{run}.selection.order", [99, 0]), (f"{run}.selection.steps", 1), (f"{run}.selection.config", None),
        (f"{run}.selection", shorter), ("stateful_callbacks.EmaCallback", None),
        ("stateful_callbacks.EmaCallback", {}),
    ]  # fmt: skip
    for path, value in damages:
        state.write_text(json.dumps(changed(whole, path, value)))
        with pytest.raises(OSError, match=r"trainer_state\.json"):
            finish_checkpoint(checkpoint, output)
        assert not output.exists(), path
