"""The names of models in a benchmark, and what they build."""

import dataclasses

import pytest
import torch
from transformers import ViTConfig, ViTForImageClassification

from lambda_vit_hf.export import variants
from lambda_vit_hf.export.onnx import export_onnx
from lambda_vit_hf.export.variants import BenchmarkSetup, build_variant, like_for_like, parse_variant, with_partners
from tests.conftest import REMOVED, TINY, perturb


@pytest.fixture
def setup(vit_folder):
    return BenchmarkSetup(model=str(vit_folder), removed_layers=tuple(REMOVED), merging_r=2, merging_start=0)


@pytest.fixture
def shallow(tmp_path):
    """Fewer layers, for engines: exporting takes long."""
    torch.manual_seed(0)
    perturb(ViTForImageClassification(ViTConfig(**{**TINY, "num_hidden_layers": 3}))).save_pretrained(tmp_path / "vit")
    return BenchmarkSetup(model=str(tmp_path / "vit"), removed_layers=(0, 2))


@torch.inference_mode()
def logits(variant):
    return variant.run(variant.images(3)).float()


def test_steps_are_taken_in_one_order_however_they_are_spelled():
    assert parse_variant("lambda+compiled+bf16+prepared+folded+removed") == (
        "lambda",
        ["removed", "folded", "bf16", "prepared", "compiled"],
    )


def test_a_path_may_hold_a_plus(tmp_path):
    (tmp_path / "a+b").mkdir()
    assert parse_variant(f"{tmp_path}/a+b+bf16") == (f"{tmp_path}/a+b", ["bf16"])


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("lambda+quick", "unknown step 'quick'"),
        ("lambda+fp32+bf16", "one precision"),
        ("lambda+onnx+compiled", "one engine"),
        ("lambda+bf16+bf16", "twice"),
        ("lambda+int8", "int8 is a step of an fp32 model in onnx"),
        ("lambda+bf16+onnx", "no bf16"),
        ("lambda+fp16+openvino", "fp32 or bf16"),
        ("lambda+onnx+openvino", "one engine"),
        ("transformers+removed", "as it is"),
        ("timm+folded", "this package's"),
        ("lambda+folded", "nothing to fold"),
        ("lambda+removed+mapped", "removed, or mapped"),
        ("timm+mapped", "this package's"),
    ],
)
def test_a_name_that_makes_no_sense_is_refused(name, reason):
    with pytest.raises(ValueError, match=reason):
        parse_variant(name)


@pytest.mark.parametrize(
    ("name", "partner"),
    [
        ("lambda+removed+folded+prepared", "transformers"),
        ("timm+removed+bf16", "transformers+bf16"),
        ("lambda+mapped+prepared", "transformers"),
        ("lambda+removed+folded+merged+prepared+onnx+int8", "transformers+onnx+int8"),
        ("transformers+onnx", "transformers+onnx"),
        ("lambda+compiled+fp16", "transformers+fp16+compiled"),
        ("model.onnx", None),
    ],
)
def test_like_is_compared_with_like(name, partner):
    assert like_for_like(name) == partner


def test_partners_are_added_where_transformers_has_the_model(setup, removed, tmp_path):
    names = ["lambda+prepared", "lambda+prepared+onnx+int8"]
    assert with_partners(names, setup) == [*names, "transformers", "transformers+onnx+int8"]
    assert with_partners(["transformers", "lambda"], setup) == ["transformers", "lambda"]
    removed.save_pretrained(tmp_path)
    assert with_partners(names, BenchmarkSetup(model=str(tmp_path))) == names


@pytest.mark.parametrize(
    ("name", "dtype"), [("lambda+onnx", "bf16"), ("lambda+openvino", "fp16"), ("lambda+onnx+int8", "fp16")]
)
def test_the_dtype_of_all_must_fit_each_name(name, dtype):
    with pytest.raises(ValueError, match=name.replace("+", "[+]")):
        parse_variant(name, dtype)
    assert parse_variant(f"{name}+fp32", dtype) == parse_variant(name, "fp32")


SAME_FUNCTION = {
    "all attention": ["timm", "lambda", "lambda+prepared", "lambda+exported"],
    "removed": ["timm+removed", "lambda+removed", "lambda+removed+folded", "lambda+removed+folded+prepared"],
}


@pytest.mark.parametrize(("function", "name"), [(key, name) for key, names in SAME_FUNCTION.items() for name in names])
def test_variants_of_one_function_agree(setup, function, name):
    variant = build_variant(name, setup)
    assert (variant.name, variant.function, variant.precision) == (name, function, "fp32")
    reference = build_variant("transformers" if function == "all attention" else "lambda+removed", setup)
    torch.testing.assert_close(logits(variant), logits(reference), atol=1e-5, rtol=1e-4)


def test_removal_and_merging_change_the_function_and_the_count(setup):
    names = ("lambda", "lambda+removed", "lambda+mapped", "lambda+merged")
    whole, removed, mapped, merged = (build_variant(name, setup) for name in names)
    assert removed.parameters < mapped.parameters < whole.parameters
    assert removed.macs < mapped.macs < whole.macs
    assert removed.weights_bytes < whole.weights_bytes
    assert merged.function is None and not torch.allclose(logits(merged), logits(whole))


def test_precision_is_the_setups_unless_the_name_says_otherwise(setup):
    in_bf16 = dataclasses.replace(setup, dtype="bf16")
    assert build_variant("lambda", in_bf16).precision == "bf16"
    assert build_variant("lambda+fp32", in_bf16).precision == "fp32"
    variant = build_variant("lambda", in_bf16)
    assert variant.images(1).dtype == torch.bfloat16
    assert variant.weights_bytes < 0.6 * build_variant("lambda", setup).weights_bytes


def test_onnx_agrees_and_int8_is_smaller_and_close(shallow):
    exact, quantized = (build_variant(f"lambda+onnx{step}", shallow) for step in ("", "+int8"))
    torch.testing.assert_close(logits(exact), logits(build_variant("transformers", shallow)), atol=1e-5, rtol=1e-4)
    assert quantized.precision == "int8" and quantized.weights_bytes < exact.weights_bytes
    difference = (logits(exact) - logits(quantized)).abs().max()
    assert 0 < difference < 0.1 * logits(exact).std()


def test_a_checkpoint_and_an_onnx_file_take_part(setup, folder, removed, tmp_path):
    checkpoint = build_variant(str(folder), setup)
    export_onnx(removed.eval(), tmp_path / "served.onnx")
    file = build_variant(str(tmp_path / "served.onnx"), setup)
    torch.testing.assert_close(logits(checkpoint), logits(file), atol=1e-5, rtol=1e-4)
    assert file.image_shape == (3, 16, 16) and file.parameters is None
    with pytest.raises(ValueError, match="no ONNX file"):
        build_variant("missing.onnx", setup)


def test_a_device_that_is_not_there_is_refused_at_once(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="no GPU"):
        BenchmarkSetup(device="cuda")
    with pytest.raises(ValueError, match="'cudaa'"):
        BenchmarkSetup(device="cudaa")


def test_random_weights_are_the_same_in_every_process():
    shape = dict(size="tiny", image_size=32, num_hidden_layers=1)
    one, other = (BenchmarkSetup(**shape).base_model for _ in range(2))
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in one.state_dict().items())
    assert (one.config.hidden_size, one.config.num_hidden_layers) == (192, 1)


def test_openvino_gives_the_logits_of_pytorch_for_any_batch(shallow):
    variant, reference = (
        build_variant("lambda+removed+folded+prepared+openvino", shallow),
        build_variant("lambda+removed", shallow),
    )
    assert (variant.name, variant.precision) == ("lambda+removed+folded+prepared+openvino", "fp32")
    for size in (1, 3):
        expected = reference.run(reference.images(size))
        torch.testing.assert_close(variant.run(variant.images(size)), expected, atol=1e-4, rtol=1e-4)


def test_openvino_says_where_a_cpu_has_no_bf16(shallow, monkeypatch):
    import openvino

    monkeypatch.setattr(openvino.Core, "get_property", lambda *args: ["FP32"])
    with monkeypatch.context() as patch:
        patch.setattr(variants, "export_onnx", lambda *_: pytest.fail("exported before it asked"))
        with pytest.raises(ValueError, match="does not compute in bf16 on this CPU"):
            build_variant("lambda+bf16+openvino", shallow)
    monkeypatch.setattr(openvino.Core, "get_property", lambda *args: ["FP32", "BF16"])
    variant = build_variant("lambda+bf16+openvino", shallow)
    assert (variant.precision, variant.dtype) == ("bf16", torch.float32)
    assert logits(variant).shape == (3, 5)
