"""Choosing, fading and removing attention layers in any training loop."""

import json
import logging

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader

from lambda_vit_hf import AttentionRemoval, DilutionConfig, LambdaViTForImageClassification, SelectionConfig
from lambda_vit_hf.models.families import FAMILIES, family_class
from lambda_vit_hf.training.removal import forget_removed_parameters
from tests.conftest import TINY
from tests.small_training import Blobs


IMAGES = torch.stack([Blobs()[index]["pixel_values"] for index in range(40)])


def train(model, removal, folder=None, resume=False, steps=8, stop=None):
    """The loop of the class's docstring, with a checkpoint after each step."""
    accelerator = Accelerator(cpu=True)
    loader = DataLoader(Blobs(), batch_size=8)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    accelerator.register_for_checkpointing(removal)
    if not resume:
        removal.choose(model, IMAGES)
    removal.plan(total_steps=steps)
    first = 0
    if resume:
        accelerator.load_state(str(folder / "3"))
        first = 3
        removal.check_restored(model, first)
    batches = [batch for _ in range(2) for batch in loader]
    for step in range(first, stop or steps):
        removal.set_lambda(model, step)
        accelerator.backward(model(**batches[step]).loss)
        optimizer.step()
        optimizer.zero_grad()
        if folder and step + 1 == 3:
            accelerator.save_state(str(folder / "3"))
    if stop is None:
        removal.finish(model, optimizer)
    return model


def test_a_loop_with_accelerate_removes_and_goes_on_from_its_checkpoint_to_the_bit(model, vit_folder, tmp_path):
    removal = AttentionRemoval(num_removed_layers=2)
    whole = train(model, removal, tmp_path)
    assert whole.config.removed_layers == removal.selection.layers and whole.config.fold_removed
    resumed_removal = AttentionRemoval(num_removed_layers=2)
    again = LambdaViTForImageClassification.from_pretrained(vit_folder)
    resumed = train(again, resumed_removal, tmp_path, resume=True)
    assert resumed_removal.selection == removal.selection
    for one, other in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_loop_that_ends_half_way_removes_nothing(model):
    removal = AttentionRemoval(removed_layers=[1])
    train(model, removal, stop=3)
    with pytest.raises(RuntimeError, match=r"only half gone \(lambda = 0\.6"):
        removal.finish(model)
    assert model.config.removed_layers == []


def test_another_schedule_than_the_checkpoints_is_refused_before_or_after_loading(model):
    removal = AttentionRemoval(removed_layers=[1])
    removal.choose(model)
    removal.plan(8)
    state = json.loads(json.dumps(removal.state_dict()))
    planned, restored = AttentionRemoval(removed_layers=[1]), AttentionRemoval(removed_layers=[1])
    planned.plan(12)
    with pytest.raises(ValueError, match="lambda would jump"):
        planned.load_state_dict(state)
    restored.load_state_dict(state)
    with pytest.raises(ValueError, match="lambda would jump"):
        restored.plan(12)


# Settings are plain values, whatever they were given as.


@pytest.mark.parametrize(
    ("given", "plain"),
    [
        ({"removed_layers": (3, 1)}, [1, 3]),
        ({"removed_layers": range(1, 4, 2)}, [1, 3]),
        ({"removed_layers": {3, 1}}, [1, 3]),
        ({"removed_layers": np.array([1, 3])}, [1, 3]),
        ({"removed_layers": torch.tensor([1, 3])}, [1, 3]),
        ({"removed_layers": {1: "one", 3: "three"}.keys()}, [1, 3]),
        ({"num_removed_layers": np.int64(0)}, 0),
        ({"num_removed_layers": np.int32(2)}, 2),
        ({"removal_ratio": np.float32(0.5)}, 0.5),
        ({"removal_ratio": 1}, 1.0),
    ],
    ids=str,
)
def test_settings_become_plain_values_that_json_can_hold(given, plain):
    removal = AttentionRemoval(
        **given, dilution=DilutionConfig(hold_share=np.float64(0.25), fold=np.bool_(True)),
        selection=SelectionConfig(calibration_size=np.int64(7)),
    )  # fmt: skip
    (name,) = given
    settings = json.loads(json.dumps(removal.settings()))
    assert settings == removal.settings()
    assert settings[name] == plain and type(settings[name]) is type(plain)


@pytest.mark.parametrize(
    "wrong",
    [
        {"removal_ratio": 1.5},
        {"removal_ratio": -0.1},
        {"removal_ratio": float("nan")},
        {"removal_ratio": True},
        {"num_removed_layers": -1},
        {"num_removed_layers": 1.5},
        {"num_removed_layers": True},
        {"removed_layers": [0.5]},
        {"removed_layers": np.array([[1, 3]])},
        {"removed_layers": [True]},
        {"removed_layers": "12"},
        {"removed_layers": 3},
        {"num_removed_layers": 1, "selection": {"mask": "skip"}},
    ],
    ids=str,
)
def test_what_fits_no_model_is_refused_at_once(wrong):
    with pytest.raises(ValueError, match=r"removal_ratio|num_removed_layers|removed_layers|SelectionConfig"):
        AttentionRemoval(**wrong)


# What would fail at the end is refused before the first step.


def test_a_ratio_that_removes_nothing_is_refused(model):
    with pytest.raises(ValueError, match="nothing would be"):
        AttentionRemoval(removal_ratio=0.05).rehearse(model)
    AttentionRemoval(removal_ratio=0.0).rehearse(model)


def test_a_rehearsal_leaves_the_model_as_it_was(model):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    AttentionRemoval(num_removed_layers=3).rehearse(model)
    assert model.config.removed_layers == [] and not model.config.fold_removed
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("family", sorted({ending for ending, _ in FAMILIES.values()}))
def test_every_family_rehearses_and_is_removed_from(family):
    shape = {name: value for name, value in TINY.items() if name != "num_labels"}
    config = family_class(f"lambda_{family}", "Config")(**shape, num_labels=3)
    model = family_class(config.model_type, "ForImageClassification")(config)
    removal = AttentionRemoval(removed_layers=[1, 3])
    removal.choose(model)
    removal.plan(total_steps=4)
    removal.set_lambda(model, 3)
    removal.finish(model)
    assert model.config.removed_layers == [1, 3] and model.config.fold_removed


class Adapted(nn.Linear):
    """As adapters are put in: a layer around a Linear, in its place."""


@pytest.mark.parametrize(("part", "refused"), [("fc2", True), ("o_proj", True), ("q_proj", False)])
def test_an_adapter_where_folding_must_divide_is_refused_before_training(model, part, refused):
    layer = model.encoder_layers[4]
    owner = layer.mlp if part == "fc2" else layer.attention
    old = getattr(owner, part)
    setattr(owner, part, Adapted(old.in_features, old.out_features))
    removal = AttentionRemoval(removed_layers=[1])
    if refused:
        with pytest.raises(ValueError, match=r"fail at the end of training.*Merge adapters"):
            removal.choose(model)
        AttentionRemoval(removed_layers=[1], dilution=DilutionConfig(fold=False)).rehearse(model)
    else:
        removal.choose(model)


def test_float16_that_cannot_hold_the_folded_weights_is_refused_before_training(model):
    model.half()
    with torch.no_grad():
        for layer in model.encoder_layers:
            layer.mlp.fc2.weight.fill_(2.0**-22)
    with pytest.raises(ValueError, match=r"fail at the end of training.*float16"):
        AttentionRemoval(num_removed_layers=5).rehearse(model)


def test_layers_that_are_gone_are_refused_with_the_way_out(model):
    model.remove_attention([1, 2])
    with pytest.raises(ValueError, match=r"\[1\] is removed already.*leave them out"):
        AttentionRemoval(removed_layers=[1, 3]).rehearse(model)


class PeftModelForImageClassification(nn.Module):
    def get_base_model(self):
        """As peft's has it."""


def test_a_model_around_a_lambda_vit_is_told_what_to_do():
    with pytest.raises(ValueError, match=r"PeftModelForImageClassification.*merge_and_unload"):
        AttentionRemoval(num_removed_layers=1).rehearse(PeftModelForImageClassification())


# A new head.


def test_layers_are_not_chosen_on_a_classifier_that_is_new(vit_folder, caplog):
    model = LambdaViTForImageClassification.from_pretrained(vit_folder, num_labels=3, ignore_mismatched_sizes=True)
    removal = AttentionRemoval(num_removed_layers=2)
    with caplog.at_level(logging.WARNING):
        assert removal.choose(model, IMAGES).output == "class_token"
    assert "class token instead" in caplog.text
    explicit = AttentionRemoval(num_removed_layers=2, selection=SelectionConfig(output="class_head"))
    with pytest.raises(ValueError, match=r"newly initialized.*class_token"):
        explicit.choose(model, IMAGES)


def test_a_jump_of_lambda_is_said(caplog):
    removal = AttentionRemoval(num_removed_layers=1, dilution=DilutionConfig(granularity="epoch"))
    removal.plan(total_steps=18, steps_per_epoch=6)
    assert "in one jump" in caplog.text and "every 6 steps" in caplog.text
    caplog.clear()
    AttentionRemoval(num_removed_layers=1).plan(total_steps=2)
    assert "in one jump" in caplog.text and "per step" not in caplog.text
    caplog.clear()
    removal.plan(total_steps=60, steps_per_epoch=6)
    assert caplog.text == ""


def test_an_optimizer_forgets_what_is_gone_and_starts_anew(model):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer)
    model(IMAGES[:2]).logits.sum().backward()
    optimizer.step()
    scheduler.step()
    model.remove_attention([1])
    forget_removed_parameters(optimizer, model)
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    assert {id(one) for one in held} == {id(one) for one in model.parameters()}
    assert not optimizer.state and optimizer.param_groups[0]["lr"] == 1e-3


@pytest.mark.parametrize(
    "damage",
    [{"dilution": None}, {"dilution": {"total_steps": "x"}}, {"selection": 7}, {"selection": {"order": [0, 99, 0]}}],
    ids=str,
)
def test_a_damaged_state_is_refused_by_name(model, damage):
    removal = AttentionRemoval(removed_layers=[1, 3])
    removal.choose(model)
    removal.plan(total_steps=12)
    with pytest.raises(OSError, match=r"trainer_state\.json of the checkpoint is damaged"):
        AttentionRemoval(removed_layers=[1, 3]).load_state_dict({**removal.state_dict(), **damage})
