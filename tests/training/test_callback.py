import copy
import json

import datasets
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import EarlyStoppingCallback, TrainerCallback, ViTImageProcessor

from lambda_vit_hf import (
    DilutionConfig,
    EntropyGuidedRemovalCallback,
    LambdaViTConfig,
    LambdaViTForImageClassification,
    SelectionConfig,
)
from lambda_vit_hf.data.dataset import AugmentationEpoch
from lambda_vit_hf.data.sampling import evenly_spaced
from tests.conftest import TINY, in_two_processes
from tests.small_training import Blobs, Recorder, StopAt, final_weights, make_trainer


@pytest.mark.draws
@pytest.mark.parametrize(
    ("amount", "expected"),
    [
        ({"removal_ratio": 0.5}, 3),
        ({"num_removed_layers": 2}, 2),
        ({"removed_layers": [5, 1]}, 2),
        ({"removal_ratio": 0.0}, 0),
    ],
    ids=str,
)
def test_training_ends_with_the_small_model(model, tmp_path, amount, expected):
    callback = EntropyGuidedRemovalCallback(**amount)
    trainer = make_trainer(model, tmp_path, [callback])
    trainer.train()
    assert model.config.removed_layers == callback.selection.layers
    assert len(callback.selection.layers) == expected
    assert model.config.fold_removed == (expected > 0)
    if "removed_layers" in amount:
        assert model.config.removed_layers == [1, 5]
    trainer.save_model()
    saved = load_file(tmp_path / "model.safetensors")
    assert not [key for key in saved for i in callback.selection.layers if f"layers.{i}.attention" in key]
    evaluated = trainer.evaluate()["eval_loss"]
    restored = LambdaViTForImageClassification.from_pretrained(tmp_path)
    assert make_trainer(restored, tmp_path, []).evaluate()["eval_loss"] == evaluated


def test_layers_are_selected_by_entropy_before_the_first_step(model, tmp_path):
    before = copy.deepcopy(model)
    callback = EntropyGuidedRemovalCallback(num_removed_layers=3, calibration_dataset=Blobs(), calibration_size=20)
    make_trainer(model, tmp_path, [callback]).train()
    from lambda_vit_hf import select_attention_layers

    images = torch.stack([Blobs()[index]["pixel_values"] for index in evenly_spaced(48, 20)])
    assert callback.selection.order == select_attention_layers(before, images, num_removed_layers=3).order
    assert callback.selection.num_images == 20


def test_the_default_calibration_set_is_the_training_set_at_a_fixed_random_state(model, tmp_path):
    selections = []
    for attempt in range(2):
        torch.manual_seed(attempt)
        callback = EntropyGuidedRemovalCallback(num_removed_layers=2)
        make_trainer(copy.deepcopy(model), tmp_path, [callback], Blobs(noise=0.5), max_steps=2).train()
        selections.append(callback.selection)
    assert selections[0] == selections[1]
    assert selections[0].num_images == 48


def test_lambda_follows_the_schedule_and_attention_stops_being_computed(model, tmp_path):
    recorder = Recorder()
    trainer = make_trainer(model, tmp_path, [EntropyGuidedRemovalCallback(removed_layers=[2, 4]), recorder])
    trainer.train()
    # 12 steps, a quarter held at zero: 9 values from 1 to 0.
    expected = [max(0.0, 1 - step / 8) for step in range(12)]
    assert [lambdas[2] for lambdas in recorder.lambdas] == pytest.approx(expected)
    assert all(lambdas[4] == lambdas[2] and lambdas[0] == 1.0 for lambdas in recorder.lambdas)
    assert recorder.attentions == [6] * 8 + [4] * 4
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["lambda"] for entry in steps] == pytest.approx(expected)
    assert [entry["kept_attention_layers"] for entry in steps] == [6] * 8 + [4] * 4


def test_attention_that_is_off_is_not_trained_on(model, tmp_path):
    recorder = Recorder()
    make_trainer(model, tmp_path, [EntropyGuidedRemovalCallback(removed_layers=[2]), recorder]).train()
    moved = [
        not all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
        for before, after in zip(recorder.weights, recorder.weights[1:], strict=False)
    ]
    assert moved == [True] * 7 + [False] * 4


def test_lambda_is_constant_within_a_step_of_accumulated_gradients(model, tmp_path):
    seen = []
    model.register_forward_pre_hook(lambda module, _: seen.append(module.attention_lambdas[1]) or None)
    callback = EntropyGuidedRemovalCallback(removed_layers=[1])
    make_trainer(model, tmp_path, [callback], gradient_accumulation_steps=3, per_device_train_batch_size=4).train()
    # The last one is of the check of the finished model.
    assert seen[:-1] == pytest.approx([max(0.0, 1 - step / 8) for step in range(12) for _ in range(3)])


def test_lambda_can_change_per_epoch(model, tmp_path):
    recorder = Recorder()
    callback = EntropyGuidedRemovalCallback(removed_layers=[1], granularity="epoch")
    # 6 steps an epoch, 4 epochs, 3 of them diluting: 1, 1/2, 0, and the last held at 0.
    make_trainer(model, tmp_path, [callback, recorder], max_steps=-1, num_train_epochs=4).train()
    assert [lambdas[1] for lambdas in recorder.lambdas] == [1.0] * 6 + [0.5] * 6 + [0.0] * 12


# Invariant 6: what counts as best is the removed model.


class ScriptedAccuracy(TrainerCallback):
    """Puts given accuracies in the place of the measured ones, before the Trainer looks for the best."""

    def __init__(self, values):
        self.values = iter(values)

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        metrics["eval_accuracy"] = next(self.values)


@pytest.mark.parametrize("save_strategy", ["steps", "best"])
def test_only_the_removed_model_can_be_the_best(model, tmp_path, save_strategy):
    # Lambda reaches 0 at step 8 (counted from 0), so the evaluations after 9 to 12 steps are of the removed model.
    accuracies = [0.9, 0.8, 0.7, 0.6, 0.5, 0.5, 0.4, 0.4, 0.2, 0.3, 0.1, 0.1]
    callbacks = [EntropyGuidedRemovalCallback(num_removed_layers=2), ScriptedAccuracy(accuracies)]
    trainer = make_trainer(
        model, tmp_path, callbacks, eval_strategy="steps", eval_steps=1, save_strategy=save_strategy, save_steps=1,
        load_best_model_at_end=True, metric_for_best_model="accuracy",
    )  # fmt: skip
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-10")
    assert trainer.state.best_metric == 0.3
    best = load_file(tmp_path / "checkpoint-10" / "model.safetensors")
    assert torch.equal(model.classifier.weight, best["classifier.weight"])
    assert len(model.config.removed_layers) == 2
    if save_strategy == "best":
        assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-10", "checkpoint-9"]


def test_the_best_is_found_also_where_the_metric_is_a_loss_and_after_resuming(tmp_path):
    arguments = dict(eval_steps=1, load_best_model_at_end=True, metric_for_best_model="loss", greater_is_better=False)
    _, _, trainer = final_weights(tmp_path, **arguments)
    eligible = {e["step"]: e["eval_loss"] for e in trainer.state.log_history if "eval_loss" in e and e["step"] > 8}
    best = min(eligible, key=eligible.get)
    assert trainer.state.best_model_checkpoint.endswith(f"checkpoint-{best}")
    _, _, resumed = final_weights(tmp_path, resume=str(tmp_path / "checkpoint-8"), **arguments)
    assert resumed.state.best_model_checkpoint == trainer.state.best_model_checkpoint
    assert resumed.state.best_metric == trainer.state.best_metric


def test_checkpoint_files_hold_strict_json_while_diluting(tmp_path):
    final_weights(tmp_path, eval_steps=1, metric_for_best_model="accuracy", load_best_model_at_end=True)
    text = (tmp_path / "checkpoint-3" / "trainer_state.json").read_text()
    json.loads(text, parse_constant=lambda constant: pytest.fail(f"{constant} is no JSON"))


def test_training_that_ends_half_way_removes_nothing_and_says_so(model, tmp_path):
    trainer = make_trainer(model, tmp_path, [EntropyGuidedRemovalCallback(removed_layers=[1]), StopAt(5)])
    with pytest.raises(RuntimeError, match=r"step 5 of 12.*lambda = 0\.500.*Nothing was removed"):
        trainer.train()
    assert model.config.removed_layers == []


def test_training_on_after_removal_removes_nothing_more(model, tmp_path, caplog):
    trainer = make_trainer(model, tmp_path, [EntropyGuidedRemovalCallback(removal_ratio=0.5)])
    trainer.train()
    removed = list(model.config.removed_layers)
    trainer.train()
    assert model.config.removed_layers == removed
    assert f"of layers {removed} of this model in an earlier training; nothing more is removed" in caplog.text


def test_a_callback_that_is_used_again_chooses_anew_for_another_model(model, tmp_path):
    other, gone = copy.deepcopy(model), copy.deepcopy(model)
    callback = EntropyGuidedRemovalCallback(num_removed_layers=2)
    make_trainer(model, tmp_path / "one", [callback]).train()
    gone.remove_attention(callback.selection.layers)  # as this callback would have
    for again, folder in ((other, "two"), (gone, "three")):
        before = again.config.removed_layers
        make_trainer(again, tmp_path / folder, [callback]).train()
        assert len(again.config.removed_layers) == len(before) + 2
        assert set(callback.selection.layers) == set(again.config.removed_layers) - set(before)
    given = EntropyGuidedRemovalCallback(removed_layers=[1])
    make_trainer(LambdaViTForImageClassification(model.config.__class__(**TINY)), tmp_path / "four", [given]).train()
    pruned = LambdaViTForImageClassification(model.config.__class__(**TINY))
    pruned.remove_attention([1])
    with pytest.raises(ValueError, match=r"layers \[1\] is removed already"):
        make_trainer(pruned, tmp_path / "five", [given]).train()


def test_a_model_that_is_half_way_diluted_cannot_start_a_new_run(model, tmp_path):
    model.set_attention_lambda(0.5, [3])
    trainer = make_trainer(model, tmp_path, [EntropyGuidedRemovalCallback(removed_layers=[1])])
    with pytest.raises(ValueError, match="half-way diluted"):
        trainer.train()


def test_early_stopping_does_not_count_evaluations_while_diluting(model, tmp_path):
    # Accuracy falls all the time: only the evaluations at lambda = 0 may run out of patience.
    callbacks = [
        EntropyGuidedRemovalCallback(num_removed_layers=2),
        ScriptedAccuracy([1 - 0.01 * step for step in range(20)]),
        EarlyStoppingCallback(2),
    ]
    trainer = make_trainer(
        model, tmp_path, callbacks, eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1,
        load_best_model_at_end=True, metric_for_best_model="accuracy",
    )  # fmt: skip
    trainer.train()
    assert trainer.state.global_step == 11
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-9")


# One Trainer, one callback, and training that goes on after it.


def test_a_second_removal_callback_is_refused_when_the_trainer_is_built(model, tmp_path):
    callbacks = [EntropyGuidedRemovalCallback(removed_layers=[1]), EntropyGuidedRemovalCallback(removed_layers=[2])]
    with pytest.raises(ValueError, match="more than one EntropyGuidedRemovalCallback"):
        make_trainer(model, tmp_path, callbacks)


def test_a_second_removal_callback_that_is_added_later_is_refused_before_the_first_step(model, tmp_path):
    trainer = make_trainer(model, tmp_path, [EntropyGuidedRemovalCallback(removed_layers=[1])])
    trainer.add_callback(EntropyGuidedRemovalCallback(removed_layers=[2]))
    with pytest.raises(ValueError, match="more than one EntropyGuidedRemovalCallback"):
        trainer.train()
    assert trainer.state.global_step == 0


class OutOfMemoryOnce(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.step = None
            raise RuntimeError("CUDA out of memory. Tried to allocate")


def test_a_restart_with_a_smaller_batch_begins_at_lambda_1(model, tmp_path):
    recorder = Recorder()
    callbacks = [EntropyGuidedRemovalCallback(num_removed_layers=2), OutOfMemoryOnce(5), recorder]
    trainer = make_trainer(model, tmp_path, callbacks, auto_find_batch_size=True)
    trainer.train()
    layer = model.config.removed_layers[0]
    assert trainer._train_batch_size < 8, "there was no restart"
    assert [lambdas[layer] for lambdas in recorder.lambdas[-12:]] == pytest.approx(
        [max(0.0, 1 - step / 8) for step in range(12)]
    )
    assert len(model.config.removed_layers) == 2


# What is said.


@pytest.mark.draws
def test_the_choice_is_one_line_at_the_default_log_level_with_its_picture(model, tmp_path, caplog):
    callback = EntropyGuidedRemovalCallback(num_removed_layers=2)
    make_trainer(model, tmp_path, [callback]).train()
    (line,) = [record.getMessage() for record in caplog.records if record.name.startswith("lambda_vit_hf.training")]
    assert f"attention of layers {callback.selection.layers}" in line
    assert "of the resamples" in line and "step 8 of 12" in line
    picture = tmp_path / "entropy.png"
    assert str(picture) in line and picture.stat().st_size > 0


def test_old_names_go_on_working_with_a_warning_that_points_here():
    with pytest.warns(FutureWarning, match="removed_layers") as caught:
        callback = EntropyGuidedRemovalCallback(layers=[3, 1])
    assert callback.removal.amount.removed_layers == [1, 3]
    assert caught[0].filename == __file__
    with pytest.warns(FutureWarning, match="num_removed_layers"):
        assert EntropyGuidedRemovalCallback(num_layers=2).removal.amount.num_removed_layers == 2


def test_options_can_be_given_as_configurations(model, tmp_path):
    callback = EntropyGuidedRemovalCallback(
        num_removed_layers=2, selection=SelectionConfig(strategy="last"), dilution=DilutionConfig(fold=False)
    )
    make_trainer(model, tmp_path, [callback]).train()
    assert model.config.removed_layers == [4, 5] and not model.config.fold_removed
    with pytest.raises(ValueError, match="SelectionConfig, not beside it"):
        EntropyGuidedRemovalCallback(num_removed_layers=2, selection=SelectionConfig(), mask="skip")
    with pytest.raises(TypeError, match="no arguments"):
        EntropyGuidedRemovalCallback(num_removed_layers=2, holdshare=0.5)


def test_images_that_the_trainer_takes_out_are_named(model, tmp_path):
    rows = datasets.Dataset.from_dict({"image": [[0.0]] * 8, "labels": [0] * 8})
    rows = rows.with_transform(lambda batch: {"pixel_values": batch["image"], "labels": batch["labels"]})
    trainer = make_trainer(model, tmp_path, [EntropyGuidedRemovalCallback(num_removed_layers=2)], rows)
    with pytest.raises(ValueError, match=r"'image'.*remove_unused_columns=False"):
        trainer.train()


def test_images_that_are_taken_out_before_a_collator_of_ones_own_are_named(model, tmp_path):
    rows = datasets.Dataset.from_dict({"image": [[0.0]] * 8, "labels": [0] * 8})
    trainer = make_trainer(model, tmp_path, [EntropyGuidedRemovalCallback(num_removed_layers=2)], rows)
    trainer.data_collator = lambda batch: {"pixel_values": torch.tensor([row["image"] for row in batch])}
    with pytest.raises(ValueError, match=r"'image'.*remove_unused_columns=False"):
        trainer.train()


def test_pictures_to_select_on_go_through_the_trainers_image_processor(model, tmp_path):
    pictures = [Image.new("RGB", (20, 24), (index, 100, 10 * index)) for index in range(16)]
    callback = EntropyGuidedRemovalCallback(num_removed_layers=2, calibration_dataset=pictures)
    trainer = make_trainer(model, tmp_path, [callback])
    with pytest.raises(TypeError, match="processing_class"):
        trainer.train()
    trainer.callback_handler.processing_class = ViTImageProcessor(size={"height": 16, "width": 16})
    trainer.train()
    assert len(model.config.removed_layers) == 2


# Bad input: before training starts.


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"num_removed_layers": 1, "removal_ratio": 0.5},
        {"num_removed_layers": 1, "granularity": "batch"},
        {"num_removed_layers": 1, "schedule": "steep"},
        {"num_removed_layers": 1, "hold_share": 1.0},
        {"num_removed_layers": 1, "calibration_size": 0},
        {"num_removed_layers": 1, "strategy": "nsoe"},
        {"num_removed_layers": 1, "strategy": len},
        {"num_removed_layers": 1, "mask": "zip"},
        {"num_removed_layers": 1, "compare": "x"},
        {"num_removed_layers": 1, "output": "logits"},
    ],
    ids=str,
)
def test_contradictory_arguments_are_refused_at_once(arguments):
    with pytest.raises(ValueError):
        EntropyGuidedRemovalCallback(**arguments)


@pytest.mark.parametrize(
    ("amount", "said"),
    [
        ({"removal_ratio": 1.2}, r"\[0, 1\]"),
        ({"removal_ratio": -0.1}, r"\[0, 1\]"),
        ({"num_removed_layers": 6}, "at least one must stay"),
        ({"removed_layers": [6]}, "out of range"),
        ({"removed_layers": [1, 1]}, "more than once"),
        ({"removed_layers": [0, 1, 2, 3, 4, 5]}, "at least one must stay"),
    ],
    ids=str,
)
def test_amounts_that_do_not_fit_the_model_are_refused_when_the_trainer_is_built(model, tmp_path, amount, said):
    with pytest.raises(ValueError, match=said):
        make_trainer(model, tmp_path, [EntropyGuidedRemovalCallback(**amount)])


def test_a_plain_vit_is_refused_when_the_trainer_is_built(vit, tmp_path):
    with pytest.raises(ValueError, match="Expected a model such as LambdaViT"):
        make_trainer(vit, tmp_path, [EntropyGuidedRemovalCallback(num_removed_layers=1)])


def test_an_empty_calibration_set_is_refused_before_the_first_step(model, tmp_path):
    trainer = make_trainer(
        model, tmp_path, [EntropyGuidedRemovalCallback(num_removed_layers=1, calibration_dataset=[])]
    )
    with pytest.raises(ValueError, match="empty"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_a_training_too_short_to_dilute_is_refused(model, tmp_path):
    trainer = make_trainer(model, tmp_path, [EntropyGuidedRemovalCallback(num_removed_layers=1)], max_steps=1)
    with pytest.raises(ValueError, match="at least 2"):
        trainer.train()


class EpochRecorder(Blobs):
    """Notes the epoch in which each of its images is read."""

    def __init__(self):
        super().__init__()
        self.epoch, self.read_in = 0, []

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __getitem__(self, index):
        self.read_in.append(self.epoch)
        return super().__getitem__(index)


def epochs_of_one_process(folder, rank):
    images = EpochRecorder()
    trainer = make_trainer(
        LambdaViTForImageClassification(LambdaViTConfig(**TINY)), folder, [AugmentationEpoch(images)], images,
        max_steps=-1, num_train_epochs=3,
    )  # fmt: skip
    trainer.train()
    return sorted(set(images.read_in))


def test_augmentation_knows_the_epoch_in_two_processes(tmp_path):
    assert in_two_processes(epochs_of_one_process, str(tmp_path)) == [[0, 1, 2], [0, 1, 2]]
