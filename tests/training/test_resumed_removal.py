"""Invariant 4: a resumed removal goes on as if never stopped, or is refused."""

import copy
import itertools
import json
import pickle
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import Trainer, TrainerCallback

from lambda_vit_hf import (
    EntropyGuidedRemovalCallback,
    LambdaViTForImageClassification,
    LambdaViTTrainer,
)
from tests.small_training import Recorder, final_weights, make_trainer


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run that nothing interrupted: its folder, only to be read; model, callback and trainer."""
    folder = tmp_path_factory.mktemp("finished")
    return folder, *final_weights(folder)


@pytest.mark.parametrize("step", [1, 4, 6, 9, 11])
def test_resuming_at_any_step_ends_in_the_same_weights(finished, tmp_path, step):
    folder, whole, callback, trainer = finished
    resumed, resumed_callback, resumed_trainer = final_weights(tmp_path, resume=str(folder / f"checkpoint-{step}"))
    assert resumed_callback.selection == callback.selection
    for (name, expected), value in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(value, expected), f"{name} differs after resuming at step {step}"
    lambdas = [[e["lambda"] for e in t.state.log_history if "loss" in e] for t in (trainer, resumed_trainer)]
    assert lambdas[0] == lambdas[1]


def test_a_resumed_run_fades_to_what_it_did(tmp_path):
    whole, callback, _ = final_weights(tmp_path, fade_to="skip")
    assert whole.config.fade_to == callback.selection.mask == "skip" and not whole.config.fold_removed
    resumed, *_ = final_weights(tmp_path, resume=str(tmp_path / "checkpoint-4"), fade_to="skip")
    assert resumed.config.fade_to == "skip"
    for (name, expected), value in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(value, expected), name
    with pytest.raises(ValueError, match=r"'fade_to': \('skip', None\)"):
        final_weights(tmp_path, resume=str(tmp_path / "checkpoint-4"))


def test_resuming_also_works_where_the_trainer_restores_callbacks_itself(finished, tmp_path):
    folder, whole, *_ = finished
    resumed, *_ = final_weights(
        tmp_path, resume=str(folder / "checkpoint-4"), restore_callback_states_from_checkpoint=True
    )
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))


def test_resuming_with_another_length_of_training_is_refused(finished, tmp_path):
    with pytest.raises(ValueError, match=r"'total_steps': 20.*'total_steps': 12"):
        final_weights(tmp_path, resume=str(finished[0] / "checkpoint-4"), max_steps=20)


def test_resuming_a_run_that_had_no_removal_is_refused(model, tmp_path):
    make_trainer(copy.deepcopy(model), tmp_path, [], save_strategy="steps", save_steps=6).train()
    trainer = make_trainer(model, tmp_path, [EntropyGuidedRemovalCallback(num_removed_layers=2)])
    with pytest.raises(ValueError, match="without EntropyGuidedRemovalCallback"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))


def test_weights_that_were_not_restored_are_noticed(finished, tmp_path):
    from safetensors.torch import save_file

    shutil.copytree(finished[0] / "checkpoint-4", tmp_path / "checkpoint-4")
    path = tmp_path / "checkpoint-4" / "model.safetensors"
    renamed = {key.replace("layers", "encoder.layer"): value for key, value in load_file(path).items()}
    save_file(renamed, path, metadata={"format": "pt"})
    with pytest.raises(RuntimeError, match="was not restored"):
        final_weights(tmp_path, resume=str(tmp_path / "checkpoint-4"))


class InterruptAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


def test_resuming_in_the_same_process_runs_at_the_lambda_of_its_step(model, tmp_path):
    recorder, stop = Recorder(), InterruptAt(8)
    callback = EntropyGuidedRemovalCallback(removed_layers=[1], granularity="epoch")
    arguments = dict(max_steps=-1, num_train_epochs=4, save_strategy="steps", save_steps=6)
    trainer = make_trainer(model, tmp_path, [callback, stop, recorder], **arguments)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.remove_callback(stop)
    recorder.lambdas.clear()
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert [lambdas[1] for lambdas in recorder.lambdas] == [0.5] * 6 + [0.0] * 12
    assert model.config.removed_layers == [1]


def test_resuming_with_other_removal_settings_is_refused(model, tmp_path):
    make_trainer(
        copy.deepcopy(model),
        tmp_path,
        [EntropyGuidedRemovalCallback(removed_layers=[1])],
        save_strategy="steps",
        save_steps=4,
    ).train()
    trainer = make_trainer(model, tmp_path, [EntropyGuidedRemovalCallback(removed_layers=[2, 3], fold=False)])
    with pytest.raises(ValueError, match=r"'removed_layers': \(\[1\], \[2, 3\]\).*'fold'"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))


@pytest.mark.parametrize("kind", [Trainer, LambdaViTTrainer])
def test_gradual_removal_with_one_trainer_and_its_checkpoints_can_be_resumed(model, tmp_path, kind):
    arguments = dict(save_strategy="steps", save_steps=4, kind=kind)
    first, second = (EntropyGuidedRemovalCallback(num_removed_layers=2) for _ in range(2))
    trainer = make_trainer(model, tmp_path, [first], **arguments)
    trainer.train()
    trainer.save_model(str(tmp_path / "two"))
    start = LambdaViTForImageClassification.from_pretrained(tmp_path / "two")
    trainer.remove_callback(first)
    trainer.add_callback(second)
    trainer.train()
    held = {id(one) for group in trainer.optimizer.param_groups for one in group["params"]}
    assert held == {id(one) for one in model.parameters()}
    assert len(model.config.removed_layers) == 4
    assert set(first.selection.layers).isdisjoint(second.selection.layers)
    # The same as with a Trainer of its own, and after resuming.
    fresh = copy.deepcopy(start)
    make_trainer(fresh, tmp_path / "fresh", [EntropyGuidedRemovalCallback(num_removed_layers=2)], **arguments).train()
    resumed = make_trainer(start, tmp_path, [EntropyGuidedRemovalCallback(num_removed_layers=2)], **arguments)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    for name, expected in fresh.state_dict().items():
        assert torch.equal(model.state_dict()[name], expected), f"{name} differs in the second training"
        assert torch.equal(start.state_dict()[name], expected), f"{name} differs after resuming"


def test_training_on_after_removal_can_be_resumed(model, tmp_path):
    arguments = dict(save_strategy="steps", save_steps=4)
    trainer = make_trainer(model, tmp_path, [EntropyGuidedRemovalCallback(num_removed_layers=2)], **arguments)
    trainer.train()
    trainer.args.max_steps = 16
    trainer.train()
    start = LambdaViTForImageClassification.from_pretrained(tmp_path / "checkpoint-12")
    assert len(start.config.removed_layers) == 2
    callback = EntropyGuidedRemovalCallback(num_removed_layers=2)
    resumed = make_trainer(start, tmp_path, [callback], **{**arguments, "max_steps": 16})
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-12"))
    assert all(torch.equal(a, b) for a, b in zip(start.parameters(), model.parameters(), strict=True))


def test_resuming_a_second_removal_into_a_model_before_the_first_is_refused(model, tmp_path):
    whole = copy.deepcopy(model)
    model.remove_attention([0, 1])
    settings = dict(save_strategy="steps", save_steps=4, kind=LambdaViTTrainer)
    make_trainer(model, tmp_path, [EntropyGuidedRemovalCallback(num_removed_layers=2)], **settings).train()
    trainer = make_trainer(whole, tmp_path, [EntropyGuidedRemovalCallback(num_removed_layers=2)], **settings)
    with pytest.raises(ValueError, match=r"no attention in layers \[0, 1\].*load the model from the checkpoint"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))


def replaced(model):
    zeros = torch.zeros(32, 32)
    model.replace_attention({1: (zeros, zeros, zeros[0])})


IN_PLACE = {
    "identity": lambda model: model.remove_attention([1]),
    "skip": lambda model: (model.set_fade_to("skip"), model.remove_attention([1])),
    "linear": replaced,
}


@pytest.mark.parametrize(("saved", "resumed"), list(itertools.permutations(IN_PLACE, 2)))
def test_a_checkpoint_with_something_else_in_the_place_of_attention_is_refused(model, tmp_path, saved, resumed):
    other = copy.deepcopy(model)
    IN_PLACE[saved](model)
    IN_PLACE[resumed](other)
    settings = dict(save_strategy="steps", save_steps=2, max_steps=2, kind=LambdaViTTrainer)
    make_trainer(model, tmp_path, [], **settings).train()
    with pytest.raises(ValueError, match=f"has '{saved}', in this model '{resumed}': load the model"):
        make_trainer(other, tmp_path, [], **{**settings, "max_steps": 4}).train(resume_from_checkpoint=True)


def test_a_model_with_linear_maps_resumes_to_the_bit(model, tmp_path):
    replaced(model)
    start, fresh = copy.deepcopy(model), copy.deepcopy(model)
    settings = dict(save_strategy="steps", save_steps=2, kind=LambdaViTTrainer, lr_scheduler_type="constant")
    make_trainer(fresh, tmp_path / "whole", [], **{**settings, "max_steps": 4}).train()
    make_trainer(model, tmp_path / "two", [], **{**settings, "max_steps": 2}).train()
    make_trainer(start, tmp_path / "two", [], **{**settings, "max_steps": 4}).train(resume_from_checkpoint=True)
    for name, expected in fresh.state_dict().items():
        assert torch.equal(start.state_dict()[name], expected), name
    assert fresh.encoder_layers[1].mapped_attention.token_proj.weight.any()


@pytest.mark.parametrize("change", [lambda model: None, lambda model: replaced(model)], ids=["whole", "linear maps"])
@pytest.mark.parametrize(
    "amount", [{"num_removed_layers": 0}, {"removal_ratio": 0.0}, {"removed_layers": []}], ids=str
)
def test_a_run_that_removes_nothing_resumes_to_the_bit(model, tmp_path, amount, change, caplog):
    change(model)
    start, layers = copy.deepcopy(model), model.config.kept_layers

    def train(model, resume=None):
        callbacks = [EntropyGuidedRemovalCallback(**amount)]
        make_trainer(model, tmp_path, callbacks, kind=LambdaViTTrainer, save_strategy="steps", save_steps=3).train(
            resume_from_checkpoint=resume
        )
        return model.state_dict()

    whole = train(model)
    assert "No attention is removed in this training." in caplog.text
    card = (tmp_path / "README.md").read_text()
    assert ("A linear map of each token" if model.config.fade_to == "linear" else "No attention was removed") in card
    for name, expected in train(start, resume=str(tmp_path / "checkpoint-6")).items():
        assert torch.equal(whole[name], expected), name
    assert start.config.kept_layers == layers


def test_resuming_from_before_the_removal_into_the_removed_model_is_refused(model, tmp_path):
    # Without an optimizer in the checkpoint the Trainer loads what fits: whole weights into a folded model.
    settings = dict(save_strategy="steps", save_steps=4, save_only_model=True)
    trainer = make_trainer(model, tmp_path, [EntropyGuidedRemovalCallback(num_removed_layers=2)], **settings)
    trainer.train()
    with pytest.raises(ValueError, match=r"before the attention of layers .* was removed, but this model has none"):
        trainer.train(resume_from_checkpoint=True)


def test_resuming_from_after_the_removal_into_the_whole_model_is_refused(model, tmp_path):
    settings = dict(save_strategy="steps", save_steps=4, save_only_model=True)
    whole = copy.deepcopy(model)
    trainer = make_trainer(model, tmp_path, [EntropyGuidedRemovalCallback(num_removed_layers=2)], **settings)
    trainer.train()
    trainer.train()
    trainer = make_trainer(whole, tmp_path, [EntropyGuidedRemovalCallback(num_removed_layers=2)], **settings)
    with pytest.raises(ValueError, match=r"after the attention of layers .* was removed, but this model has it still"):
        trainer.train(resume_from_checkpoint=True)


def test_a_checkpoint_with_the_old_names_of_settings_resumes(model, tmp_path):
    settings = dict(save_strategy="steps", save_steps=4)
    start = copy.deepcopy(model)
    make_trainer(model, tmp_path, [EntropyGuidedRemovalCallback(num_removed_layers=2)], **settings).train()
    path = tmp_path / "checkpoint-4" / "trainer_state.json"
    state = json.loads(path.read_text())
    saved = state["stateful_callbacks"]["EntropyGuidedRemovalCallback"]
    saved["args"] = {
        "removal_ratio": None, "num_layers": 2, "layers": None, "calibration_size": 512, "strategy": "nose",
        "output": None, "mask": "skip", "compare": "magnitude", "schedule": "linear", "hold_share": 0.25,
        "granularity": "step", "fold": True,
    }  # fmt: skip
    path.write_text(json.dumps(state))
    trainer = make_trainer(start, tmp_path, [EntropyGuidedRemovalCallback(num_removed_layers=2)], **settings)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert all(torch.equal(a, b) for a, b in zip(start.parameters(), model.parameters(), strict=True))


def pruned(model):
    model.remove_attention([0])


@pytest.mark.parametrize(
    ("change", "number"), [(lambda model: replaced(model), 0), (pruned, 1)], ids=["maps", "pruned"]
)
def test_resuming_with_the_model_as_it_was_before_is_refused_by_a_plain_trainer(model, tmp_path, change, number):
    whole = copy.deepcopy(model)
    change(model)
    # With an optimizer's state torch refuses it, in other words.
    settings = dict(save_strategy="steps", save_steps=6, save_only_model=True)
    make_trainer(model, tmp_path, [EntropyGuidedRemovalCallback(num_removed_layers=number)], **settings).train()
    trainer = make_trainer(whole, tmp_path, [EntropyGuidedRemovalCallback(num_removed_layers=number)], **settings)
    with pytest.raises(ValueError, match="is of a model that has no attention in layers"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))


@pytest.mark.parametrize("number", [0, 1])
def test_a_callback_that_trained_another_model_resumes_and_can_be_resumed(model, tmp_path, number):
    other = copy.deepcopy(model)
    other.remove_attention([1])
    start, again = copy.deepcopy(other), copy.deepcopy(other)
    used = EntropyGuidedRemovalCallback(num_removed_layers=number)
    make_trainer(model, tmp_path / "one", [used]).train()
    settings = dict(save_strategy="steps", save_steps=3)
    make_trainer(other, tmp_path / "two", [used], **settings).train()
    checkpoint = str(tmp_path / "two" / "checkpoint-6")
    make_trainer(
        start, tmp_path / "three", [EntropyGuidedRemovalCallback(num_removed_layers=number)], **settings
    ).train(resume_from_checkpoint=checkpoint)
    busy = EntropyGuidedRemovalCallback(num_removed_layers=number)
    make_trainer(copy.deepcopy(again), tmp_path / "four", [busy]).train()  # so that it knows layers of another model
    make_trainer(again, tmp_path / "five", [busy], **settings).train(resume_from_checkpoint=checkpoint)
    for name, expected in other.state_dict().items():
        assert torch.equal(start.state_dict()[name], expected) and torch.equal(again.state_dict()[name], expected), (
            name
        )
    assert pickle.loads(pickle.dumps(busy.removal)).selection == busy.selection


@pytest.mark.parametrize(
    "change",
    [{"token_merging_r": 2}, {"token_merging_start": 1}, {"drop_path_rate": 0.2}, {"drop_path_schedule": "linear"}],
    ids=str,
)
def test_a_checkpoint_of_other_settings_of_the_model_is_refused(model, tmp_path, change):
    config = copy.deepcopy(model.config)
    for name, value in change.items():
        setattr(config, name, value)
    changed = LambdaViTForImageClassification(config)
    settings = dict(kind=LambdaViTTrainer, save_strategy="steps", save_steps=6)
    make_trainer(changed, tmp_path, [EntropyGuidedRemovalCallback(num_removed_layers=2)], **settings).train()
    trainer = make_trainer(model, tmp_path, [EntropyGuidedRemovalCallback(num_removed_layers=2)], **settings)
    with pytest.raises(ValueError, match=f"was trained with {next(iter(change))} = "):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
