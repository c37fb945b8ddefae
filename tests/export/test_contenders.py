"""The names of models in a benchmark, and what they build."""

import dataclasses

import pytest
import torch

from lambda_vit_hf.export.contenders import Contest, build_contender, parse_contender
from lambda_vit_hf.export.onnx import export_onnx
from tests.conftest import REMOVED


@pytest.fixture
def contest(vit_folder):
    return Contest(model=str(vit_folder), layers=tuple(REMOVED), merging_r=2, merging_start=0)


@torch.inference_mode()
def logits(contender):
    return contender.run(contender.images(3)).float()


def test_steps_are_taken_in_one_order_however_they_are_spelled():
    assert parse_contender("lambda+compiled+bf16+prepared+folded+removed") == (
        "lambda",
        ["removed", "folded", "bf16", "prepared", "compiled"],
    )


def test_a_path_may_hold_a_plus(tmp_path):
    (tmp_path / "a+b").mkdir()
    assert parse_contender(f"{tmp_path}/a+b+bf16") == (f"{tmp_path}/a+b", ["bf16"])


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("lambda+quick", "unknown step 'quick'"),
        ("lambda+fp32+bf16", "one precision"),
        ("lambda+onnx+compiled", "one engine"),
        ("lambda+bf16+bf16", "twice"),
        ("lambda+int8", "int8 is a step of an fp32 model in onnx"),
        ("lambda+bf16+onnx", "no bf16"),
        ("transformers+removed", "as it is"),
        ("timm+folded", "this package's"),
        ("lambda+folded", "nothing to fold"),
    ],
)
def test_a_name_that_makes_no_sense_is_refused(name, reason):
    with pytest.raises(ValueError, match=reason):
        parse_contender(name)


SAME_FUNCTION = {
    "all attention": ["timm", "lambda", "lambda+prepared", "lambda+exported"],
    "removed": ["timm+removed", "lambda+removed", "lambda+removed+folded", "lambda+removed+folded+prepared"],
}


@pytest.mark.parametrize(("function", "name"), [(key, name) for key, names in SAME_FUNCTION.items() for name in names])
def test_contenders_of_one_function_agree(contest, function, name):
    contender = build_contender(name, contest)
    assert (contender.name, contender.function, contender.precision) == (name, function, "fp32")
    reference = build_contender("transformers" if function == "all attention" else "lambda+removed", contest)
    torch.testing.assert_close(logits(contender), logits(reference), atol=1e-5, rtol=1e-4)


def test_removal_and_merging_change_the_function_and_the_count(contest):
    whole, removed, merged = (build_contender(name, contest) for name in ("lambda", "lambda+removed", "lambda+merged"))
    assert removed.parameters < whole.parameters and removed.macs < whole.macs
    assert removed.weights_bytes < whole.weights_bytes
    assert merged.function is None and not torch.allclose(logits(merged), logits(whole))


def test_precision_is_the_contests_unless_the_name_says_otherwise(contest):
    in_bf16 = dataclasses.replace(contest, dtype="bf16")
    assert build_contender("lambda", in_bf16).precision == "bf16"
    assert build_contender("lambda+fp32", in_bf16).precision == "fp32"
    contender = build_contender("lambda", in_bf16)
    assert contender.images(1).dtype == torch.bfloat16
    assert contender.weights_bytes < 0.6 * build_contender("lambda", contest).weights_bytes


def test_onnx_agrees_and_int8_is_smaller_and_close(contest):
    exact, quantized = (build_contender(f"lambda+onnx{step}", contest) for step in ("", "+int8"))
    torch.testing.assert_close(logits(exact), logits(build_contender("transformers", contest)), atol=1e-5, rtol=1e-4)
    assert quantized.precision == "int8" and quantized.weights_bytes < exact.weights_bytes
    difference = (logits(exact) - logits(quantized)).abs().max()
    assert 0 < difference < 0.1 * logits(exact).std()


def test_a_checkpoint_and_an_onnx_file_take_part(contest, folder, removed, tmp_path):
    checkpoint = build_contender(str(folder), contest)
    export_onnx(removed.eval(), tmp_path / "served.onnx")
    file = build_contender(str(tmp_path / "served.onnx"), contest)
    torch.testing.assert_close(logits(checkpoint), logits(file), atol=1e-5, rtol=1e-4)
    assert file.image_shape == (3, 16, 16) and file.parameters is None
    with pytest.raises(ValueError, match="no ONNX file"):
        build_contender("missing.onnx", contest)


def test_random_weights_are_the_same_in_every_process():
    shape = dict(size="tiny", image_size=32, num_hidden_layers=1)
    one, other = (Contest(**shape).base_model for _ in range(2))
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in one.state_dict().items())
    assert (one.config.hidden_size, one.config.num_hidden_layers) == (192, 1)
