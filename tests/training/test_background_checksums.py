"""The list of a checkpoint's files: training does not wait for it, and nothing that needs it goes before it."""

import threading
import time

import pytest
from transformers import Trainer, TrainerCallback

from lambda_vit_hf import EntropyGuidedRemovalCallback
from lambda_vit_hf.models.checksums import MANIFEST, find_damage, write_checksums
from lambda_vit_hf.training import background_checksums
from lambda_vit_hf.training.trainer_mixin import LambdaViTTrainer
from tests.small_training import make_trainer


class AtStep(TrainerCallback):
    def __init__(self, step, action):
        self.step, self.action = step, action

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.action()


def train(model, folder, kind, callbacks=(), removal=True, **options):
    settings = dict(save_strategy="steps", save_steps=4, max_steps=8) | options
    removals = [EntropyGuidedRemovalCallback(removed_layers=[1])] if removal else []
    make_trainer(model, folder, [*removals, *callbacks], kind=kind, **settings).train()


KINDS = pytest.mark.parametrize(
    ("kind", "removal"), [(Trainer, True), (LambdaViTTrainer, True), (LambdaViTTrainer, False)]
)


@KINDS
def test_training_goes_on_while_a_checkpoint_is_listed(model, tmp_path, monkeypatch, kind, removal):
    step_after = threading.Event()

    def write_late(folder):
        assert step_after.wait(60), "training waited for the list"
        return write_checksums(folder)

    monkeypatch.setattr(background_checksums, "write_checksums", write_late)
    train(model, tmp_path, kind, [AtStep(5, step_after.set)], removal)
    for step in (4, 8):
        folder = tmp_path / f"checkpoint-{step}"
        assert (folder / MANIFEST).is_file() and find_damage(folder) is None


@KINDS
def test_old_checkpoints_are_deleted_after_they_are_listed(model, tmp_path, monkeypatch, kind, removal):
    def write_slowly(folder):
        names = [path.name for path in folder.iterdir()]
        time.sleep(0.2)
        assert names == [path.name for path in folder.iterdir()], "deleted, or written to, while it is read"
        return write_checksums(folder)

    monkeypatch.setattr(background_checksums, "write_checksums", write_slowly)
    train(model, tmp_path, kind, (), removal, save_steps=1, save_total_limit=1, max_steps=6)
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-6"]
    assert (tmp_path / "checkpoint-6" / MANIFEST).is_file()


@KINDS
@pytest.mark.parametrize("failing", [4, 8])
def test_a_list_that_cannot_be_written_ends_the_training(model, tmp_path, monkeypatch, kind, removal, failing):
    def write_nothing(folder):
        if folder.name == f"checkpoint-{failing}":
            raise OSError("No space left on device")

    monkeypatch.setattr(background_checksums, "write_checksums", write_nothing)
    with pytest.raises(OSError, match="No space left"):
        train(model, tmp_path, kind, (), removal)


def test_a_training_that_breaks_off_leaves_its_checkpoints_listed(model, tmp_path, monkeypatch):
    def stop():
        raise SystemExit(143)

    def write_slowly(folder):
        time.sleep(0.5)
        return write_checksums(folder)

    monkeypatch.setattr(background_checksums, "write_checksums", write_slowly)
    with pytest.raises(SystemExit):
        train(model, tmp_path, LambdaViTTrainer, [AtStep(5, stop)])
    assert (tmp_path / "checkpoint-4" / MANIFEST).is_file()
