"""Which checkpoint is whole: real files, then each kind of damage a killed run leaves behind."""

import json
import logging
import time
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from lambda_vit_hf import LambdaViTConfig, LambdaViTForImageClassification
from lambda_vit_hf.models.checksums import write_checksums
from lambda_vit_hf.training.checkpoints import find_resumable_checkpoint, what_is_broken
from lambda_vit_hf.training.trainer_mixin import LambdaViTTrainer
from tests.conftest import TINY, in_two_processes
from tests.small_training import make_trainer


def write_checkpoint(folder: Path) -> Path:
    """What the Trainer writes, small."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "lambda_vit", "attention_flags": [True, False]}))
    save_file({"weight": torch.ones(8, 8)}, folder / "model.safetensors")
    parameter = torch.nn.Parameter(torch.ones(8, 8))
    optimizer = torch.optim.AdamW([parameter])
    parameter.sum().backward()
    optimizer.step()
    torch.save(optimizer.state_dict(), folder / "optimizer.pt")
    torch.save(torch.optim.lr_scheduler.ConstantLR(optimizer).state_dict(), folder / "scheduler.pt")
    torch.save({"cpu": torch.get_rng_state()}, folder / "rng_state.pth")
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": 10, "log_history": []}, indent=2))
    return folder


FILES = ("trainer_state.json", "config.json", "model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth")


@pytest.fixture
def checkpoint(tmp_path):
    return write_checkpoint(tmp_path / "checkpoint-10")


def test_a_whole_checkpoint_is_found(checkpoint):
    assert what_is_broken(checkpoint) is None
    assert what_is_broken(str(checkpoint)) is None
    assert find_resumable_checkpoint(str(checkpoint.parent)) == checkpoint


def test_several_processes_have_a_random_state_each(checkpoint):
    (checkpoint / "rng_state.pth").rename(checkpoint / "rng_state_0.pth")
    torch.save({}, checkpoint / "rng_state_1.pth")
    assert what_is_broken(checkpoint) is None


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_noticed(checkpoint, name):
    (checkpoint / name).unlink()
    problem = what_is_broken(checkpoint)
    expected = {"model.safetensors": "weights", "rng_state.pth": "rng_state"}.get(name, name)
    assert problem is not None and problem.startswith("no ") and expected in problem
    assert find_resumable_checkpoint(checkpoint.parent) is None


@pytest.mark.parametrize("name", FILES)
def test_a_file_cut_short_anywhere_is_noticed(checkpoint, name):
    whole = (checkpoint / name).read_bytes()
    for length in (0, 1, len(whole) // 4, len(whole) // 2, len(whole) * 3 // 4, len(whole) - 1):
        (checkpoint / name).write_bytes(whole[:length])
        problem = what_is_broken(checkpoint)
        assert problem is not None, f"{name} with {length} of {len(whole)} bytes passed as whole"
        assert name in problem and "cut short" in problem
    (checkpoint / name).write_bytes(whole)
    assert what_is_broken(checkpoint) is None


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_zeros_is_noticed(checkpoint, name):
    # What a crashed machine leaves, where the length reached the disk but the content did not.
    path = checkpoint / name
    path.write_bytes(bytes(path.stat().st_size))
    assert name in (what_is_broken(checkpoint) or "nothing"), f"{name} full of zeros passed as whole"


def test_a_damaged_shard_is_noticed(checkpoint):
    (checkpoint / "model.safetensors").rename(checkpoint / "model-00001-of-00002.safetensors")
    (checkpoint / "model-00002-of-00002.safetensors").write_bytes(b"")
    assert "model-00002-of-00002.safetensors" in what_is_broken(checkpoint)


def test_the_newest_by_number_is_found_not_by_alphabet(tmp_path):
    for step in (9, 10, 100):
        write_checkpoint(tmp_path / f"checkpoint-{step}")
    assert find_resumable_checkpoint(tmp_path).name == "checkpoint-100"
    (tmp_path / "checkpoint-100" / "trainer_state.json").unlink()
    assert find_resumable_checkpoint(tmp_path).name == "checkpoint-10"


def test_an_incomplete_newest_is_passed_over_and_named(tmp_path, caplog):
    for step in (5, 10, 15):
        write_checkpoint(tmp_path / f"checkpoint-{step}")
    (tmp_path / "checkpoint-15" / "trainer_state.json").unlink()
    optimizer = tmp_path / "checkpoint-10" / "optimizer.pt"
    optimizer.write_bytes(optimizer.read_bytes()[:-100])
    with caplog.at_level(logging.WARNING, logger="lambda_vit_hf"):
        assert find_resumable_checkpoint(tmp_path).name == "checkpoint-5"
    newest, second = caplog.messages
    assert "checkpoint-15" in newest and "no trainer_state.json" in newest
    assert "checkpoint-10" in second and "optimizer.pt is cut short" in second


def test_nothing_is_logged_where_the_newest_is_whole(checkpoint, caplog):
    (checkpoint.parent / "checkpoint-5").mkdir()
    assert find_resumable_checkpoint(checkpoint.parent) == checkpoint
    assert caplog.messages == []


def test_only_incomplete_checkpoints_are_none(tmp_path):
    (tmp_path / "checkpoint-3").mkdir()
    assert find_resumable_checkpoint(tmp_path) is None


def test_no_checkpoints_are_none(tmp_path):
    assert find_resumable_checkpoint(tmp_path) is None
    assert find_resumable_checkpoint(tmp_path / "no-such-folder") is None


def test_other_names_are_no_checkpoints(tmp_path):
    for name in ("checkpoint-", "checkpoint-best", "checkpoint-10-old", "tmp-checkpoint-10", "checkpoint-1e3"):
        write_checkpoint(tmp_path / name)
    assert find_resumable_checkpoint(tmp_path) is None


def test_a_file_with_the_name_of_a_checkpoint_is_passed_over(checkpoint):
    (checkpoint.parent / "checkpoint-11").write_text("an archive, or a note")
    assert find_resumable_checkpoint(checkpoint.parent) == checkpoint


def test_a_missing_shard_is_noticed(checkpoint):
    (checkpoint / "model.safetensors").rename(checkpoint / "model-00001-of-00002.safetensors")
    shards = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    assert "model-00002-of-00002.safetensors" in what_is_broken(checkpoint)


def flip_a_bit(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def record_in(path: Path, suffix: str) -> int:
    """Where the bytes of a record of an archive of torch begin."""
    with zipfile.ZipFile(path) as archive:
        record = next(info for info in archive.infolist() if info.filename.endswith(suffix))
        with archive.open(record) as content:
            return path.read_bytes().index(content.read(8), record.header_offset + 30)


def test_a_flipped_bit_in_moments_of_the_optimizer_is_noticed_without_checksums(checkpoint):
    flip_a_bit(checkpoint / "optimizer.pt", record_in(checkpoint / "optimizer.pt", "data/0"))
    torch.load(checkpoint / "optimizer.pt")  # which does not notice
    assert what_is_broken(checkpoint).startswith("optimizer.pt is damaged: the checksum of")


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_anywhere_is_noticed_by_the_checksums(checkpoint, name):
    write_checksums(checkpoint)
    flip_a_bit(checkpoint / name, (checkpoint / name).stat().st_size // 2)
    assert name in (what_is_broken(checkpoint) or "nothing")


def test_a_damaged_newest_checkpoint_is_passed_over_and_the_file_is_named(tmp_path, caplog):
    for step in (5, 10):
        write_checksums(write_checkpoint(tmp_path / f"checkpoint-{step}"))
    flip_a_bit(tmp_path / "checkpoint-10" / "model.safetensors", -9)
    assert find_resumable_checkpoint(tmp_path).name == "checkpoint-5"
    assert "checkpoint-10" in caplog.text and "model.safetensors" in caplog.text


class SlowSecondProcess(LambdaViTTrainer):
    def _save_rng_state(self, output_dir):
        time.sleep(self.args.process_index)
        super()._save_rng_state(output_dir)


class Look(TrainerCallback, ExportableState):
    """Which random states are there just before `trainer_state.json` is written."""

    def __init__(self, folder: str):
        self.folder, self.seen = folder, []

    def state(self):
        self.seen = sorted(path.name for path in Path(self.folder).rglob("rng_state*"))
        return {"args": {}, "attributes": {}}


def train_slowly(folder: str, rank: int) -> list[str]:
    look = Look(folder)
    model = LambdaViTForImageClassification(LambdaViTConfig(**TINY))
    options = dict(save_strategy="steps", save_steps=2, max_steps=2)
    make_trainer(model, folder, [look], kind=SlowSecondProcess, **options).train()
    return look.seen


def test_in_two_processes_a_checkpoint_is_whole_only_with_both_random_states(tmp_path):
    assert in_two_processes(train_slowly, str(tmp_path))[0] == ["rng_state_0.pth", "rng_state_1.pth"]
    listed = (tmp_path / "checkpoint-2" / "SHA256SUMS").read_text()
    assert "rng_state_0.pth" in listed and "rng_state_1.pth" in listed


def test_resume_true_takes_the_newest_whole_checkpoint(model, tmp_path, caplog):
    options = dict(save_strategy="steps", save_steps=4, kind=LambdaViTTrainer)
    make_trainer(model, tmp_path, [], **options).train()
    flip_a_bit(tmp_path / "checkpoint-12" / "optimizer.pt", 1000)
    make_trainer(model, tmp_path, [], **options).train(resume_from_checkpoint=True)
    assert "checkpoint-12: optimizer.pt: not the content" in caplog.text
    assert what_is_broken(tmp_path / "checkpoint-12") is None, "it should be written anew, from checkpoint-8 on"
    for step in (4, 8, 12):
        flip_a_bit(tmp_path / f"checkpoint-{step}" / "model.safetensors", 1000)
    with pytest.raises(ValueError, match="No valid checkpoint"):
        make_trainer(model, tmp_path, [], **options).train(resume_from_checkpoint=True)
    with pytest.raises(OSError, match=r"model\.safetensors"):
        make_trainer(model, tmp_path, [], **options).train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))


@pytest.mark.parametrize(
    "state",
    [
        None, [], "x", 1, {"global_step": None}, {"global_step": -1}, {"max_steps": 1.5}, {"log_history": {"a": 1}},
        {"log_history": [1]}, {"stateful_callbacks": [1]}, {"stateful_callbacks": {"EmaCallback": 1}},
    ],
    ids=str,
)  # fmt: skip
def test_a_state_of_other_kinds_is_noticed_without_checksums(checkpoint, state):
    (checkpoint / "trainer_state.json").write_text(json.dumps(state))
    assert "trainer_state.json" in (what_is_broken(checkpoint) or "nothing")


def test_an_average_that_the_state_knows_nothing_of_is_noticed(checkpoint):
    save_file({"weight": torch.ones(8, 8)}, checkpoint / "ema.safetensors")
    assert what_is_broken(checkpoint) == "trainer_state.json is damaged: it knows nothing of ema.safetensors"
