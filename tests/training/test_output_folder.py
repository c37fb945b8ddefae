"""The output folder: what may be written over, what is gone on from."""

import json
import logging
import multiprocessing
import os
import signal
import socket
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lambda_vit_hf.training import output_folder
from lambda_vit_hf.training.arguments import LambdaTrainingArguments
from lambda_vit_hf.training.ema import EMA_FILE
from lambda_vit_hf.training.output_folder import hold_output_folder, open_output_folder


def training_args(folder: Path, **options) -> LambdaTrainingArguments:
    return LambdaTrainingArguments(output_dir=str(folder), use_cpu=True, report_to="none", **options)


def write_checkpoint(folder: Path, num_processes: int = 1, averaged: bool = False, callbacks=()) -> Path:
    folder.mkdir(parents=True)
    save_file({"weight": torch.zeros(2)}, folder / "model.safetensors")
    if averaged:
        save_file({"weight": torch.zeros(2)}, folder / EMA_FILE)
    for name in ("optimizer.pt", "scheduler.pt"):
        torch.save({}, folder / name)
    names = ["rng_state.pth"] if num_processes == 1 else [f"rng_state_{rank}.pth" for rank in range(num_processes)]
    for name in names:
        torch.save({}, folder / name)
    (folder / "config.json").write_text("{}")
    (folder / "trainer_state.json").write_text(json.dumps({"stateful_callbacks": {name: {} for name in callbacks}}))
    return folder


def test_a_new_or_empty_folder_has_nothing_to_resume(tmp_path):
    folder = open_output_folder(training_args(tmp_path / "new"))
    assert (folder.checkpoint, folder.base_checkpoint) == (None, None)


def test_resuming_takes_the_newest_checkpoint_of_the_removal(tmp_path):
    for step in (2, 10):
        write_checkpoint(tmp_path / f"checkpoint-{step}")
    write_checkpoint(tmp_path / "base-training" / "checkpoint-99")
    folder = open_output_folder(training_args(tmp_path, resume_from_checkpoint="true"))
    assert (folder.checkpoint, folder.base_checkpoint) == (tmp_path / "checkpoint-10", None)


def test_resuming_goes_on_with_the_base_model_if_that_was_not_finished(tmp_path):
    checkpoint = write_checkpoint(tmp_path / "base-training" / "checkpoint-5")
    folder = open_output_folder(training_args(tmp_path, resume_from_checkpoint="true"))
    assert (folder.checkpoint, folder.base_checkpoint) == (None, checkpoint)
    (tmp_path / "base").mkdir()
    assert open_output_folder(training_args(tmp_path, resume_from_checkpoint="true")).base_checkpoint is None


def test_a_checkpoint_without_its_average_is_passed_over_where_weights_are_averaged(tmp_path, caplog):
    write_checkpoint(tmp_path / "checkpoint-2", averaged=True, callbacks=["EmaCallback"])
    write_checkpoint(tmp_path / "checkpoint-4", callbacks=["EmaCallback"])
    resuming = training_args(tmp_path, resume_from_checkpoint="true")
    assert open_output_folder(resuming).checkpoint == tmp_path / "checkpoint-2"
    assert f"no {EMA_FILE}" in caplog.text
    named = training_args(tmp_path, resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    with pytest.raises(ValueError, match=EMA_FILE):
        open_output_folder(named)


def test_another_number_of_processes_is_said(tmp_path, caplog):
    write_checkpoint(tmp_path / "checkpoint-2", num_processes=4)
    with caplog.at_level(logging.WARNING):
        open_output_folder(training_args(tmp_path, resume_from_checkpoint="true"))
    assert "written by 4 processes, this run has 1" in caplog.text


def test_the_same_number_of_processes_needs_no_words(tmp_path, caplog):
    write_checkpoint(tmp_path / "checkpoint-2")
    with caplog.at_level(logging.WARNING):
        open_output_folder(training_args(tmp_path, resume_from_checkpoint="true"))
    assert caplog.text == ""


def test_the_base_model_appears_only_when_it_is_whole(tmp_path):
    folder = open_output_folder(training_args(tmp_path))
    write_checkpoint(folder.base_training / "checkpoint-3")
    (folder.base_training / "config.json").write_text("{}")
    assert not folder.base.exists()
    folder.keep_base()
    assert [path.name for path in folder.base.iterdir()] == ["config.json"]
    assert not folder.base_training.exists()


def test_a_finished_base_model_is_something_to_go_on_from(tmp_path, caplog):
    (tmp_path / "base").mkdir()
    wanted = open_output_folder(training_args(tmp_path, resume_from_checkpoint="true", overwrite_output_dir=True))
    assert wanted.is_resumed
    assert "going on with the removal" in caplog.text
    assert not open_output_folder(training_args(tmp_path, overwrite_output_dir=True)).is_resumed


def test_going_on_in_another_folder_brings_the_base_model_along(tmp_path):
    checkpoint = write_checkpoint(tmp_path / "one" / "checkpoint-3")
    (tmp_path / "one" / "base").mkdir()
    (tmp_path / "one" / "base" / "config.json").touch()
    folder = open_output_folder(training_args(tmp_path / "two", resume_from_checkpoint=str(checkpoint)))
    folder.bring_base()
    assert (tmp_path / "two" / "base" / "config.json").is_file()
    write_checkpoint(tmp_path / "two" / "checkpoint-9")
    with pytest.raises(FileExistsError, match="another run"):
        open_output_folder(training_args(tmp_path / "two", resume_from_checkpoint=str(checkpoint)))


def test_a_checkpoint_of_the_base_models_training_is_not_one_of_the_removal(tmp_path):
    checkpoint = write_checkpoint(tmp_path / "base-training" / "checkpoint-3")
    with pytest.raises(ValueError, match="base model's training"):
        open_output_folder(training_args(tmp_path, resume_from_checkpoint=str(checkpoint)))


def test_clearing_deletes_what_could_be_resumed_and_nothing_else(tmp_path):
    write_checkpoint(tmp_path / "checkpoint-3")
    write_checkpoint(tmp_path / "base-training" / "checkpoint-1")
    (tmp_path / "base").mkdir()
    (tmp_path / "notes.txt").touch()
    open_output_folder(training_args(tmp_path, overwrite_output_dir=True)).clear()
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_base_model_that_was_half_copied_when_a_run_was_killed_is_not_taken(tmp_path, monkeypatch):
    checkpoint = write_checkpoint(tmp_path / "one" / "checkpoint-3")
    (tmp_path / "one" / "base").mkdir()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "one" / "base" / name).write_text(name)
    folder = open_output_folder(training_args(tmp_path / "two", resume_from_checkpoint=str(checkpoint)))

    def copy_one_and_stop(source, destination):
        Path(destination, "config.json").parent.mkdir(parents=True, exist_ok=True)
        Path(destination, "config.json").touch()
        raise KeyboardInterrupt

    monkeypatch.setattr("shutil.copytree", copy_one_and_stop)
    with pytest.raises(KeyboardInterrupt):
        folder.bring_base()
    monkeypatch.undo()
    assert not (tmp_path / "two" / "base").exists()
    folder.bring_base()
    assert sorted(path.name for path in (tmp_path / "two" / "base").iterdir()) == ["config.json", "model.safetensors"]
    assert [path.name for path in (tmp_path / "two").iterdir()] == ["base"]


def test_a_kill_while_old_things_are_deleted_leaves_no_half_of_them(tmp_path, monkeypatch):
    write_checkpoint(tmp_path / "checkpoint-3")
    folder = open_output_folder(training_args(tmp_path, overwrite_output_dir=True))

    def delete_one_and_stop(path, **kwargs):
        if Path(path).is_dir():
            next(iter(Path(path).iterdir())).unlink()
            raise KeyboardInterrupt

    monkeypatch.setattr("shutil.rmtree", delete_one_and_stop)
    with pytest.raises(KeyboardInterrupt):
        folder.clear()
    assert list(tmp_path.glob("checkpoint-*")) == []


def hold(path, connection):
    with hold_output_folder(path):
        connection.send("held")
        connection.recv()


@pytest.fixture
def other_run(tmp_path):
    """Another process that holds the folder `run`."""
    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=hold, args=(tmp_path / "run", there))
    process.start()
    assert here.recv() == "held"
    yield process, here
    process.kill()
    process.join()


def test_a_second_run_in_a_folder_is_told_who_writes_there(tmp_path, other_run):
    process, connection = other_run
    with (
        pytest.raises(FileExistsError, match=rf"Another run.*process {process.pid} on host {socket.gethostname()}"),
        hold_output_folder(tmp_path / "run"),
    ):
        pass
    connection.send("end")
    process.join()
    with hold_output_folder(tmp_path / "run"):
        assert os.listdir(tmp_path / "run") == [".lock"]
        assert open_output_folder(training_args(tmp_path / "run")).checkpoint is None  # it counts as empty


def test_the_lock_of_a_run_that_was_killed_does_not_count(tmp_path, other_run):
    process, _ = other_run
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert (tmp_path / "run" / ".lock").is_file()
    with hold_output_folder(tmp_path / "run"):
        pass
    assert not (tmp_path / "run" / ".lock").exists()


def test_a_run_that_comes_to_nothing_leaves_no_folder(tmp_path):
    with pytest.raises(ValueError, match="wrong input"), hold_output_folder(tmp_path / "run"):
        raise ValueError("wrong input")
    assert not (tmp_path / "run").exists()
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError, match="is a file"), hold_output_folder(tmp_path / "file"):
        pass


@pytest.mark.parametrize("content", [b"", b"\xff\xfe\x00", b"x" * 10**6])
def test_a_lock_that_cannot_be_read_still_locks(tmp_path, content):
    (tmp_path / ".lock").write_bytes(content)
    with pytest.raises(FileExistsError, match="Another run writes to") as caught, hold_output_folder(tmp_path):
        pass
    assert len(str(caught.value)) < 1000


def test_a_lock_that_is_given_back_while_we_look_is_no_crash(tmp_path, monkeypatch):
    (tmp_path / ".lock").write_text("1\nelsewhere\n")
    timeout = output_folder.Timeout

    def gone(self):
        (tmp_path / ".lock").unlink()
        raise timeout("lock")

    monkeypatch.setattr(output_folder.SoftFileLock, "acquire", gone)
    with pytest.raises(FileExistsError, match=r"process \? on host \?"), hold_output_folder(tmp_path):
        pass
