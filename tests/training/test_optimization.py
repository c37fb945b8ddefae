import pytest
import timm
import torch
from timm.optim import param_groups_weight_decay
from timm.scheduler import CosineLRScheduler

from lambda_vit_hf import LambdaViTConfig, LambdaViTForMaskedImageModeling
from lambda_vit_hf.models.conversion import convert_checkpoint
from lambda_vit_hf.training.optimization import (
    cosine_schedule,
    decay_parameter_names,
    parameter_groups,
    scaled_learning_rate,
    timm_cosine,
)
from tests.conftest import TINY, perturb


def optimizer_of(model, learning_rate=5e-4) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameter_groups(model, 0.05), lr=learning_rate)


@pytest.fixture
def linear() -> torch.nn.Module:
    return torch.nn.Linear(2, 2)


def test_the_parameters_with_weight_decay_are_those_of_timm(tmp_path):
    shape = dict(img_size=16, patch_size=4, embed_dim=128, depth=2, num_heads=2, num_classes=5)
    source = perturb(timm.create_model("vit_tiny_patch16_224", pretrained=False, **shape))
    torch.save(source.state_dict(), tmp_path / "vit.pth")
    model = convert_checkpoint(tmp_path / "vit.pth")
    groups = param_groups_weight_decay(source, 0.05, no_weight_decay_list=source.no_weight_decay())
    theirs = [one for group in groups if group["weight_decay"] for one in group["params"]]
    names = decay_parameter_names(model)
    ours = [parameter for name, parameter in model.named_parameters() if name in names]
    # Query, key and value are rows of one tensor there, and their elements distinct: compared by value.
    ours, theirs = (torch.cat([one.flatten() for one in each]).sort().values for each in (ours, theirs))
    assert torch.equal(ours, theirs)


def test_tokens_positions_biases_and_norms_are_not_decayed():
    model = LambdaViTForMaskedImageModeling(LambdaViTConfig(**TINY))
    decayed = decay_parameter_names(model)
    spared = {name for name, _ in model.named_parameters()} - set(decayed)
    assert {f"vit.embeddings.{name}" for name in ("cls_token", "mask_token", "position_embeddings")} <= spared
    assert all(name.endswith(("token", "embeddings", "bias")) or "layernorm" in name for name in spared)
    assert all(name.endswith("weight") and "layernorm" not in name for name in decayed)


def test_groups_hold_every_trainable_parameter_once(model):
    model.classifier.requires_grad_(False)
    no_decay, decay = parameter_groups(model, 0.05)
    assert (no_decay["weight_decay"], decay["weight_decay"]) == (0.0, 0.05)
    grouped = [id(one) for group in (no_decay, decay) for one in group["params"]]
    assert sorted(grouped) == sorted(id(one) for one in model.parameters() if one.requires_grad)
    assert len(parameter_groups(model, 0.0)) == 1


def test_the_learning_rate_grows_with_the_global_batch():
    assert scaled_learning_rate(5e-4, 8 * 256) == pytest.approx(2e-3)
    assert scaled_learning_rate(1e-3, 256, base=1024) == pytest.approx(2.5e-4)
    with pytest.raises(ValueError, match="at least 1"):
        scaled_learning_rate(5e-4, 0)


@pytest.mark.parametrize("prefix", [False, True])
@pytest.mark.parametrize("warmup", [0, 1, 20])
def test_the_learning_rate_equals_timms_at_every_update(linear, warmup, prefix):
    reference = optimizer_of(linear)
    theirs = CosineLRScheduler(
        reference, 400, lr_min=1e-5, warmup_t=warmup, warmup_lr_init=1e-6, warmup_prefix=prefix, t_in_epochs=False
    )
    optimizer = optimizer_of(linear)
    ours = cosine_schedule(optimizer, 400, warmup, warmup_prefix=prefix)
    for update in range(420):
        for group, reference_group in zip(optimizer.param_groups, reference.param_groups, strict=True):
            assert group["lr"] == pytest.approx(reference_group["lr"], rel=1e-9), update
        optimizer.step()
        ours.step()
        theirs.step_update(update + 1)


def test_held_within_an_epoch_it_equals_timms_schedule_in_epochs(linear):
    epochs, steps = 30, 7
    reference = optimizer_of(linear)
    theirs = CosineLRScheduler(reference, epochs, lr_min=1e-5, warmup_t=5, warmup_lr_init=1e-6, t_in_epochs=True)
    optimizer = optimizer_of(linear)
    ours = cosine_schedule(optimizer, epochs * steps, 5 * steps, steps_per_update=steps)
    for epoch in range(epochs):
        for _ in range(steps):
            assert optimizer.param_groups[0]["lr"] == pytest.approx(reference.param_groups[0]["lr"], rel=1e-9), epoch
            optimizer.step()
            ours.step()
        theirs.step(epoch + 1)


def test_the_papers_recipe_begins_at_the_warm_up_and_ends_at_the_floor():
    recipe = dict(total_steps=4000, warmup_steps=50, learning_rate=2e-3)
    rates = [2e-3 * timm_cosine(step, **recipe) for step in range(4001)]
    assert rates[0] == pytest.approx(1e-6)
    assert rates[-1] == pytest.approx(1e-5)
    assert max(rates) == rates[50] < 2e-3  # the cosine has begun at step 0
    assert rates[2000] == pytest.approx((2e-3 + 1e-5) / 2)


def test_a_schedule_continues_from_its_saved_state(linear, tmp_path):
    def after(steps, state=None):
        optimizer = optimizer_of(linear)
        schedule = cosine_schedule(optimizer, 100, 10)
        if state is not None:
            schedule.load_state_dict(state)
        for _ in range(steps):
            optimizer.step()
            schedule.step()
        return schedule

    torch.save(after(30).state_dict(), tmp_path / "scheduler.pt")
    state = torch.load(tmp_path / "scheduler.pt", weights_only=True)
    assert after(5, state).get_last_lr() == after(35).get_last_lr()


def test_another_schedule_does_not_continue_from_that_state(linear):
    state = cosine_schedule(optimizer_of(linear), 100, 10).state_dict()
    with pytest.raises(ValueError, match=r"differs from the checkpoint's .*'total_steps': \(100, 200\)"):
        cosine_schedule(optimizer_of(linear), 200, 10).load_state_dict(state)
    plain = torch.optim.lr_scheduler.LambdaLR(optimizer_of(linear), lambda step: 1.0).state_dict()
    with pytest.raises(ValueError, match="differs"):
        cosine_schedule(optimizer_of(linear), 100, 10).load_state_dict(plain)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(total_steps=0, warmup_steps=0), "at least 1"),
        (dict(total_steps=10, warmup_steps=11), "between 0 and"),
        (dict(total_steps=10, warmup_steps=1, min_learning_rate=1e-2), "lower them too"),
        (dict(total_steps=10, warmup_steps=1, warmup_learning_rate=1e-2), "lower them too"),
        (dict(total_steps=10, warmup_steps=1, steps_per_update=0), "at least 1"),
    ],
)
def test_contradictory_schedules_are_refused(linear, settings, message):
    with pytest.raises(ValueError, match=message):
        cosine_schedule(optimizer_of(linear), **settings)


def test_groups_of_different_learning_rates_are_refused():
    groups = [{"params": [torch.nn.Parameter(torch.ones(1))], "lr": rate} for rate in (1e-3, 1e-4)]
    with pytest.raises(ValueError, match="one learning rate"):
        cosine_schedule(torch.optim.AdamW(groups), 10, 1)
