"""Speed and time left in the logs."""

import json

import pytest
import torch
from transformers import Trainer, TrainingArguments

from lambda_vit_hf.training.progress import ThroughputCallback


class Images(torch.utils.data.Dataset):
    def __len__(self):
        return 24

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        return {"pixel_values": torch.randn(3, 16, 16, generator=generator), "labels": index % 5}


def train(model, folder, **options):
    args = TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=4, logging_steps=2, report_to="none", use_cpu=True,
        disable_tqdm=True, save_strategy="no", **options,
    )  # fmt: skip
    trainer = Trainer(model=model, args=args, train_dataset=Images(), callbacks=[ThroughputCallback()])
    trainer.train()
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def test_every_log_of_training_has_speed_and_time_left(model, tmp_path):
    logs = train(model, tmp_path, num_train_epochs=1)
    assert [entry["step"] for entry in logs] == [2, 4, 6]
    assert all(entry["images_per_second"] > 0 for entry in logs)
    assert all(entry["hours_left"] >= 0 for entry in logs)
    assert logs[-1]["hours_left"] == 0


def test_speed_counts_all_images_of_an_optimizer_step_and_no_pauses(monkeypatch):
    now = iter([0.0, 0.0, 1.0, 2.0, 102.0, 103.0, 103.0]).__next__
    monkeypatch.setattr("lambda_vit_hf.training.progress.time.perf_counter", now)
    callback = ThroughputCallback()

    class Args:
        train_batch_size, gradient_accumulation_steps, world_size = 8, 2, 3

    class State:
        global_step, max_steps, log_history = 0, 30, [{}]

    logs = {"loss": 1.0}
    callback.on_train_begin(Args, State, None)  # 0 s
    callback.on_epoch_begin(Args, State, None)  # 0 s
    callback.on_step_end(Args, State, None)  # 1 s
    callback.on_step_end(Args, State, None)  # 2 s
    callback.on_evaluate(Args, State, None)  # 102 s: evaluation took 100
    callback.on_step_end(Args, State, None)  # 103 s
    State.global_step = 3
    callback.on_log(Args, State, None, logs=logs)
    assert logs["images_per_second"] == pytest.approx(3 * 48 / 3)
    assert logs["hours_left"] == pytest.approx(27 * 103 / 3 / 3600, abs=1e-4)
    assert State.log_history[-1].keys() == {"images_per_second", "hours_left"}


def test_trackers_see_speed_and_lambda(model, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from lambda_vit_hf.training.callback import EntropyGuidedRemovalCallback

    args = TrainingArguments(
        output_dir=str(tmp_path), per_device_train_batch_size=4, logging_steps=2, report_to="tensorboard",
        use_cpu=True, disable_tqdm=True, save_strategy="no", num_train_epochs=1,
    )  # fmt: skip
    callbacks = [EntropyGuidedRemovalCallback(removed_layers=[1]), ThroughputCallback()]
    trainer = Trainer(model=model, args=args, train_dataset=Images(), callbacks=callbacks)
    handler = trainer.callback_handler
    handler.callbacks = [*callbacks, *[one for one in handler.callbacks if one not in callbacks]]
    trainer.train()
    (events,) = tmp_path.rglob("events.out.*")
    accumulator = EventAccumulator(str(events.parent))
    accumulator.Reload()
    drawn = accumulator.Tags()["scalars"]
    assert {"train/lambda", "train/kept_attention_layers", "train/images_per_second", "train/hours_left"} <= set(drawn)
    assert [event.value for event in accumulator.Scalars("train/lambda")] == sorted(
        [event.value for event in accumulator.Scalars("train/lambda")], reverse=True
    )
    assert json.dumps(trainer.state.log_history)
