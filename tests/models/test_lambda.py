"""Lambda lives in its buffer: whatever changes the buffer changes the model, at the next forward."""

import copy

import pytest
import torch
from torch.func import functional_call

from lambda_vit_hf import LambdaViTForImageClassification


LAYER = 2
VALUES = [0.0, 0.3, 1.0]


def logits(model, pixel_values):
    with torch.no_grad():
        return model(pixel_values).logits


def with_lambda(model, value):
    model = copy.deepcopy(model)
    model.set_attention_lambda(value, [LAYER])
    return model


def fill(model, value):
    model.encoder_layers[LAYER].attention_lambda.fill_(value)


def fill_data(model, value):
    model.encoder_layers[LAYER].attention_lambda.data.fill_(value)


def replace_buffer(model, value):
    model.encoder_layers[LAYER].attention_lambda = torch.tensor(value)


def load(model, value, **how):
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state[f"vit.layers.{LAYER}.attention_lambda"] = torch.tensor(value)
    model.load_state_dict(state, **how)


def load_by_assignment(model, value):
    load(model, value, assign=True)


def average(model, value):
    other = with_lambda(model, value)
    for mine, theirs in zip(model.buffers(), other.buffers(), strict=True):
        mine.lerp_(theirs, 1.0)


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("before", VALUES)
@pytest.mark.parametrize("edit", [fill, fill_data, replace_buffer, load, load_by_assignment, average])
@torch.no_grad()
def test_an_edit_of_the_buffer_acts_in_the_next_forward(model, pixel_values, edit, before, value):
    expected = logits(with_lambda(model, value), pixel_values)
    model.set_attention_lambda(before, [LAYER])
    logits(model, pixel_values)  # whatever is remembered, is remembered now
    edit(model, value)
    assert torch.equal(logits(model, pixel_values), expected)
    assert model.attention_lambdas[LAYER] == pytest.approx(value)


@pytest.mark.parametrize("value", VALUES)
def test_a_functional_call_computes_with_the_lambda_it_is_given(model, pixel_values, value):
    expected = logits(with_lambda(model, value), pixel_values)
    whole = logits(model, pixel_values)
    with torch.no_grad():
        given = {f"vit.layers.{LAYER}.attention_lambda": torch.tensor(value)}
        found = functional_call(model, given, (pixel_values,)).logits
    assert torch.equal(found, expected)
    assert torch.equal(logits(model, pixel_values), whole)


def test_an_average_of_models_follows_its_own_lambda(model, pixel_values):
    average = torch.optim.swa_utils.AveragedModel(model, use_buffers=True)
    average.update_parameters(model)
    diluted = with_lambda(model, 0.5)
    average.update_parameters(diluted)  # of lambda 1 and 0.5
    assert torch.allclose(
        logits(average.module, pixel_values), logits(with_lambda(model, 0.75), pixel_values), atol=1e-6
    )


@pytest.mark.parametrize(
    ("value", "state"),
    [(1.0, "kept"), (0.999999, "diluting"), (0.4, "diluting"), (1e-6, "diluting"), (0.0, "off")],
)
def test_the_state_is_derived_from_the_buffer(model, value, state):
    fill(model, value)
    assert model.encoder_layers[LAYER].attention_state == state
    assert f"attention {state}" in repr(model.encoder_layers[LAYER])


def test_attention_that_is_off_is_not_computed_after_an_edit_either(model, pixel_values):
    with torch.no_grad():
        model.encoder_layers[LAYER].attention.q_proj.weight.fill_(torch.inf)
    fill(model, 0.0)
    assert torch.isfinite(logits(model, pixel_values)).all()


def test_a_compiled_model_follows_every_edit_of_the_buffer(model, pixel_values):
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    logits(compiled, pixel_values)
    for value in VALUES:
        fill(model, value)
        expected = logits(with_lambda(model, value), pixel_values)
        torch.testing.assert_close(logits(compiled, pixel_values), expected, msg=f"lambda {value}")


@pytest.mark.parametrize("value", [0.0, 0.3])
def test_an_exported_program_has_the_lambda_of_the_last_forward(model, pixel_values, value):
    fill(model, value)
    expected = logits(model, pixel_values)
    program = torch.export.export(model, (pixel_values,)).module()
    with torch.no_grad():
        torch.testing.assert_close(program(pixel_values).logits, expected)


def test_models_on_the_meta_device_have_shapes_whatever_lambda_is(vit_folder):
    model = LambdaViTForImageClassification.from_pretrained(vit_folder)
    meta = copy.deepcopy(model).to("meta")
    assert meta(torch.zeros(2, 3, 16, 16, device="meta")).logits.shape == (2, 5)


@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan"), None, "0.3", True])
def test_a_lambda_that_is_none_is_refused(model, value):
    with pytest.raises(ValueError, match=r"lambda must be a number in \[0, 1\]"):
        model.set_attention_lambda(value, [LAYER])
