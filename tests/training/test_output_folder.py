"""The output folder: what may be written over, what is gone on from."""

import json
import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lambda_vit_hf.training.arguments import LambdaTrainingArguments
from lambda_vit_hf.training.ema import EMA_FILE
from lambda_vit_hf.training.output_folder import open_output_folder


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
