import copy
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from timm.utils import ModelEmaV3
from transformers import Trainer, TrainerCallback

from lambda_vit_hf import EntropyGuidedRemovalCallback, LambdaViTForImageClassification, LambdaViTTrainer
from lambda_vit_hf.training.checkpoints import what_is_broken
from lambda_vit_hf.training.ema import EMA_FILE, EmaCallback
from tests.small_training import Blobs, make_trainer


DECAY = 0.9


class ByHand(TrainerCallback):
    """timm's own average of the raw weights, and what evaluations ran on. Stands after the callback under test."""

    def __init__(self, decay=DECAY):
        self.decay, self.evaluated, self.raw, self.lambdas = decay, [], [], []

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.average = ModelEmaV3(model, self.decay, exclude_buffers=True)

    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.average.update(model)
        self.raw.append(weights(model))
        self.lambdas.append(model.attention_lambdas)

    def on_prediction_step(self, args, state, control, model=None, **kwargs):
        self.evaluated.append((state.global_step, weights(model), weights(self.average.module)))


def weights(model) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()]).clone()


def trained(model, folder, callbacks, resume=None, **arguments):
    trainer = make_trainer(model, folder, callbacks, **arguments)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def test_after_100_steps_the_model_holds_timms_average(model, tmp_path):
    by_hand = ByHand(decay=0.97)
    trained(model, tmp_path, [EmaCallback(0.97), by_hand], max_steps=100)
    assert torch.equal(weights(model), weights(by_hand.average.module))
    assert (weights(model) - by_hand.raw[-1]).abs().max() > 1e-3


def test_evaluation_runs_on_the_average_and_training_goes_on_with_the_raw_weights(model, tmp_path):
    plain = copy.deepcopy(model)
    reference = ByHand()
    trained(plain, tmp_path / "plain", [reference])
    by_hand = ByHand()
    trained(
        model, tmp_path / "ema", [EmaCallback(DECAY), by_hand], eval_strategy="steps", eval_steps=5,
        per_device_eval_batch_size=48,
    )  # fmt: skip
    assert [step for step, _, _ in by_hand.evaluated] == [5, 10, 12]
    for _, evaluated, averaged in by_hand.evaluated:
        assert torch.equal(evaluated, averaged)
    for ours, theirs in zip(by_hand.raw, reference.raw, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("strategy", ["steps", "epoch"])
@pytest.mark.parametrize("in_front", [True, False])
def test_the_place_among_the_trainers_own_callbacks_does_not_matter(model, tmp_path, strategy, in_front):
    by_hand, ema = ByHand(), EmaCallback(DECAY)
    trainer = make_trainer(model, tmp_path, [ema, by_hand], eval_strategy=strategy, eval_steps=4, eval_on_start=True)
    others = [one for one in trainer.callback_handler.callbacks if one not in (ema, by_hand)]
    trainer.callback_handler.callbacks = [ema, by_hand, *others] if in_front else [*others, ema, by_hand]
    trainer.train()
    assert {step for step, _, _ in by_hand.evaluated} == ({0, 4, 8, 12} if strategy == "steps" else {0, 6, 12})
    assert all(torch.equal(evaluated, averaged) for _, evaluated, averaged in by_hand.evaluated)


def test_evaluation_can_stay_with_the_raw_weights(model, tmp_path):
    by_hand = ByHand()
    sets = {"one": Blobs(), "two": Blobs()}
    trainer = make_trainer(
        model, tmp_path, [EmaCallback(DECAY, use_for_evaluation=False), by_hand], eval_strategy="steps", eval_steps=6
    )
    trainer.eval_dataset = sets
    trainer.train()
    assert all(torch.equal(evaluated, by_hand.raw[step - 1]) for step, evaluated, _ in by_hand.evaluated)
    assert torch.equal(weights(model), weights(by_hand.average.module))


def test_a_second_evaluation_set_is_not_silently_measured_on_other_weights(model, tmp_path):
    trainer = make_trainer(model, tmp_path, [EmaCallback(DECAY)], eval_strategy="steps", eval_steps=4)
    trainer.eval_dataset = {"one": Blobs(), "two": Blobs()}
    with pytest.raises(RuntimeError, match=r"step 4 measured the raw weights.*use_for_evaluation=False"):
        trainer.train()


def test_after_training_evaluation_is_of_the_average_and_needs_no_callback(model, tmp_path):
    trainer = trained(model, tmp_path, [EmaCallback(DECAY)])
    shipped = weights(model)
    first, second = trainer.evaluate(), trainer.evaluate()
    assert first["eval_loss"] == second["eval_loss"]
    assert torch.equal(weights(model), shipped)


def test_a_checkpoint_holds_raw_weights_and_the_average_beside_them(model, tmp_path):
    by_hand = ByHand()
    trained(
        model, tmp_path, [EmaCallback(DECAY), by_hand], save_strategy="steps", save_steps=6, eval_strategy="steps",
        eval_steps=6,
    )  # fmt: skip
    checkpoint = tmp_path / "checkpoint-12"
    assert sorted(path.name for path in checkpoint.glob("*.safetensors*")) == [EMA_FILE, "model.safetensors"]
    raw = LambdaViTForImageClassification.from_pretrained(checkpoint)
    assert torch.equal(weights(raw), by_hand.raw[-1])
    raw.load_state_dict(load_file(checkpoint / EMA_FILE))
    assert torch.equal(weights(raw), weights(model))
    assert what_is_broken(checkpoint) is None


def test_a_resumed_run_ends_in_the_same_average(model, tmp_path):
    settings = dict(save_strategy="steps", save_steps=5, eval_strategy="steps", eval_steps=3)
    resumed = copy.deepcopy(model)
    trained(model, tmp_path, [EmaCallback(DECAY), EntropyGuidedRemovalCallback(removed_layers=[1, 4])], **settings)
    shutil.rmtree(tmp_path / "checkpoint-10")
    shutil.rmtree(tmp_path / "checkpoint-12")
    trained(
        resumed, tmp_path, [EmaCallback(DECAY), EntropyGuidedRemovalCallback(removed_layers=[1, 4])], True, **settings
    )
    assert torch.equal(weights(resumed), weights(model))
    assert resumed.config.removed_layers == model.config.removed_layers == [1, 4]


def test_a_checkpoint_that_was_moved_is_found_by_its_path(model, tmp_path):
    settings = dict(save_strategy="steps", save_steps=6)
    start = copy.deepcopy(model)
    trained(model, tmp_path / "one", [EmaCallback(DECAY)], **settings)
    checkpoint = str(tmp_path / "one" / "checkpoint-6")
    with pytest.raises(FileNotFoundError, match=r"two/checkpoint-6/ema.safetensors is missing.*resume_from"):
        trained(copy.deepcopy(start), tmp_path / "two", [EmaCallback(DECAY)], checkpoint, **settings)
    callback = EmaCallback(DECAY)
    callback.resume_from = checkpoint
    trained(start, tmp_path / "two", [callback], checkpoint, **settings)
    assert torch.equal(weights(start), weights(model))


def test_resuming_without_the_right_average_is_refused(model, tmp_path):
    settings = dict(save_strategy="steps", save_steps=4)
    trained(copy.deepcopy(model), tmp_path, [EmaCallback(DECAY)], **settings)
    trained(copy.deepcopy(model), tmp_path / "without", [], **settings)

    def resume(folder=tmp_path, decay=DECAY):
        trained(copy.deepcopy(model), folder, [EmaCallback(decay)], str(folder / "checkpoint-8"), **settings)

    with pytest.raises(ValueError, match="written without EmaCallback"):
        resume(tmp_path / "without")
    with pytest.raises(ValueError, match="settings differ"):
        resume(decay=0.5)
    average = tmp_path / "checkpoint-8" / EMA_FILE
    content = average.read_bytes()
    average.write_bytes(content[:-10])
    with pytest.raises(OSError, match="damaged"):
        resume()
    average.write_bytes((tmp_path / "checkpoint-4" / EMA_FILE).read_bytes())
    with pytest.raises(OSError, match="holds the average of step 4, expected step 8"):
        resume()
    average.unlink()
    with pytest.raises(FileNotFoundError, match=r"checkpoint-8/ema.safetensors is missing"):
        resume()


@pytest.mark.parametrize(
    ("kind", "what_is_missing"), [(LambdaViTTrainer, "no trainer_state.json"), (Trainer, f"no {EMA_FILE}")], ids=str
)
def test_a_checkpoint_whose_average_was_not_written_is_not_whole(model, tmp_path, monkeypatch, kind, what_is_missing):
    def disk_full(tensors, path, **kwargs):
        path.write_bytes(b"cut short")
        raise OSError("No space left on device")

    monkeypatch.setattr("lambda_vit_hf.training.ema.save_file", disk_full)
    with pytest.raises(OSError, match="No space left"):
        trained(model, tmp_path, [EmaCallback(DECAY)], kind=kind, save_strategy="steps", save_steps=4)
    assert not (tmp_path / "checkpoint-4" / EMA_FILE).exists()
    assert what_is_broken(tmp_path / "checkpoint-4") == what_is_missing


def test_the_average_is_on_the_disk_before_the_checkpoint_is_whole(model, tmp_path, monkeypatch):
    present = []

    def saved(trainer, folder):
        present.append(sorted(path.name for path in Path(folder).iterdir()))
        Trainer._save_rng_state(trainer, folder)

    monkeypatch.setattr(LambdaViTTrainer, "_save_rng_state", saved)
    arguments = dict(save_strategy="steps", save_steps=6)
    trained(model, tmp_path, [EmaCallback(DECAY)], kind=LambdaViTTrainer, **arguments)
    assert len(present) == 2
    assert all(EMA_FILE in names and "trainer_state.json" not in names for names in present)


def test_asking_for_the_state_writes_nothing(model, tmp_path):
    ema = EmaCallback(DECAY)
    trained(model, tmp_path, [ema], save_strategy="steps", save_steps=6)
    shutil.rmtree(tmp_path / "checkpoint-12")
    assert ema.state()["args"]["decay"] == DECAY
    assert not (tmp_path / "checkpoint-12").exists()


def test_the_shipped_model_is_the_average_removed_and_folded(model, tmp_path):
    by_hand = ByHand()
    callbacks = [EmaCallback(DECAY), by_hand, EntropyGuidedRemovalCallback(removed_layers=[1, 4])]
    trainer = trained(model, tmp_path, callbacks)
    expected = by_hand.average.module
    expected.set_attention_lambda(0.0, [1, 4])
    expected.remove_attention([1, 4])
    expected.fold_removed_attention()
    assert model.config.removed_layers == [1, 4] and model.config.fold_removed
    trainer.save_model()
    restored = LambdaViTForImageClassification.from_pretrained(tmp_path)
    assert torch.equal(weights(restored), weights(expected))
    pixel_values = torch.stack([Blobs()[index]["pixel_values"] for index in range(8)])
    assert torch.equal(restored(pixel_values).logits, expected.eval()(pixel_values).logits)


def test_lambda_is_copied_and_the_averaged_model_follows_it(model, tmp_path):
    ema = EmaCallback(DECAY)
    seen = []

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            averaged = ema.average.module
            seen.append(model.attention_lambdas[2])
            assert averaged.attention_lambdas == model.attention_lambdas
            states = [[layer.attention_state for layer in one.encoder_layers] for one in (averaged, model)]
            assert states[0] == states[1]

    trained(model, tmp_path, [ema, Watch(), EntropyGuidedRemovalCallback(removed_layers=[2])])
    assert seen[0] == 1.0 and 0.0 < seen[4] < 1.0 and seen[-1] == 0.0


def test_the_best_checkpoints_average_is_shipped(model, tmp_path):
    accuracies = iter([0.1, 0.9, 0.2])
    trainer = make_trainer(
        model, tmp_path, [EmaCallback(DECAY)], save_strategy="steps", save_steps=4, eval_strategy="steps",
        eval_steps=4, load_best_model_at_end=True, metric_for_best_model="accuracy",
    )  # fmt: skip
    trainer.compute_metrics = lambda prediction: {"accuracy": next(accuracies)}
    trainer.train()
    assert trainer.state.best_global_step == 8
    best = LambdaViTForImageClassification.from_pretrained(tmp_path / "checkpoint-8")
    best.load_state_dict(load_file(tmp_path / "checkpoint-8" / EMA_FILE))
    assert torch.equal(weights(model), weights(best))


def test_standing_after_the_removal_is_refused_before_the_first_step(model, tmp_path):
    with pytest.raises(ValueError, match="must stand before EntropyGuidedRemovalCallback"):
        trained(model, tmp_path, [EntropyGuidedRemovalCallback(removed_layers=[1]), EmaCallback(DECAY)])
    assert model.config.removed_layers == []


def test_layers_removed_under_the_average_are_noticed(model, tmp_path):
    class Remove(TrainerCallback):
        def on_train_end(self, args, state, control, model=None, **kwargs):
            model.remove_attention([1])

    with pytest.raises(RuntimeError, match="EmaCallback must stand before"):
        trained(model, tmp_path, [Remove(), EmaCallback(DECAY)])


def test_an_evaluation_called_off_does_not_leave_the_average_in_training(model, tmp_path):
    class CallOff(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_evaluate = False

    trainer = make_trainer(
        model, tmp_path, [EmaCallback(DECAY), CallOff()], eval_strategy="steps", eval_steps=4, save_strategy="steps",
        save_steps=4,
    )  # fmt: skip
    with pytest.raises(RuntimeError, match="still holds the averaged weights"):
        trainer.train()
    assert what_is_broken(tmp_path / "checkpoint-4") == "no trainer_state.json"


def test_decay_out_of_range_is_refused():
    with pytest.raises(ValueError, match=r"in \[0, 1\)"):
        EmaCallback(1.0)


def test_settings_in_numpys_numbers_are_kept_as_json():
    state = EmaCallback(np.float32(0.5), use_for_evaluation=np.bool_(False)).state()
    assert json.loads(json.dumps(state))["args"] == {"decay": 0.5, "use_for_evaluation": False}
