"""Exported models give the logits of the models they came from."""

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn
from transformers import ViTConfig

from lambda_vit_hf import (
    LambdaDinov2Config,
    LambdaDinov2Model,
    LambdaViTBackbone,
    LambdaViTConfig,
    LambdaViTForImageClassification,
    LambdaViTModel,
)
from lambda_vit_hf.export import onnx as export
from lambda_vit_hf.export.onnx import (
    compare_onnx,
    compare_outputs,
    export_onnx,
    export_program,
    exported_program,
)
from lambda_vit_hf.export.openvino_ir import export_openvino, openvino_core, run_openvino
from lambda_vit_hf.export.precision import halve_onnx, linear_nodes, quantize_onnx
from lambda_vit_hf.export.variants import run_session
from lambda_vit_hf.models.mapped_attention import LinearMap
from tests.conftest import TINY, perturb


REMOVED = [0, 2]


def small_model():
    """Fewer layers than elsewhere: exporting takes long."""
    torch.manual_seed(0)
    return perturb(LambdaViTForImageClassification(LambdaViTConfig(**{**TINY, "num_hidden_layers": 3})))


@pytest.fixture
def model():
    return small_model()


MAP = LinearMap(torch.eye(32), torch.eye(32).flip(0), torch.arange(32.0))
STATES = {
    "removed": lambda model: model.remove_attention(REMOVED),
    "folded": lambda model: (model.remove_attention(REMOVED), model.fold_removed_attention()),
    "prepared": lambda model: (model.remove_attention(REMOVED), model.prepare_for_inference()),
    "with a linear map": lambda model: model.replace_attention({1: MAP}),
    "merged": lambda model: (model.remove_attention(REMOVED), model.set_token_merging(2)),
    "merged, as many as can": lambda model: model.set_token_merging([100] + [0] * (len(model.encoder_layers) - 1)),
}


@pytest.fixture
def removed(model):
    STATES["folded"](model)
    return model


@torch.no_grad()
def logits(model, images):
    return model(images).logits.numpy()


@pytest.mark.parametrize("state", STATES)
def test_onnx_gives_the_same_logits_for_any_batch(model, state, tmp_path, pixel_values):
    STATES[state](model)
    check = export_onnx(model, tmp_path / "model.onnx")
    assert check.max_difference < 1e-4 and check.agreement == 1.0
    assert check.file_bytes == (tmp_path / "model.onnx").stat().st_size
    assert [path.name for path in tmp_path.glob("*.onnx*")] == ["model.onnx"], "the weights belong in the file"
    content = (tmp_path / "model.onnx").read_bytes()
    assert b".py" not in content, "paths of this machine are nobody's business"
    seven = pixel_values.repeat(3, 1, 1, 1)[:7]
    assert compare_onnx(model, tmp_path / "model.onnx", seven).max_difference < 1e-4


@pytest.mark.parametrize("state", ["prepared", "merged"])
def test_torch_export_gives_the_same_logits_for_any_batch(model, state, tmp_path, pixel_values):
    STATES[state](model)
    check = export_program(model, tmp_path / "model.pt2")
    assert check.max_difference < 1e-4
    loaded = torch.export.load(tmp_path / "model.pt2").module()
    for images in (pixel_values[:1], pixel_values):
        np.testing.assert_allclose(loaded(images).detach().numpy(), logits(model, images), atol=1e-4)


@pytest.mark.parametrize("export_to", [export_onnx, export_program])
def test_an_export_that_computes_something_else_is_refused_and_leaves_no_file(
    removed, tmp_path, monkeypatch, export_to
):
    monkeypatch.setattr(export, "TOLERANCE", -1.0)  # less than any difference
    (tmp_path / "new").mkdir()
    with pytest.raises(ValueError, match=r"another function \(tolerance -1.0\)"):
        export_to(removed.eval(), tmp_path / "new" / "model")
    assert list((tmp_path / "new").iterdir()) == []


def test_what_cannot_be_exported_is_said(removed, tmp_path):
    with pytest.raises(ValueError, match="eval mode"):
        export_onnx(removed.train(), tmp_path / "model.onnx")
    with pytest.raises(ValueError, match="bfloat16"):
        export_onnx(removed.eval().bfloat16(), tmp_path / "model.onnx")


@pytest.fixture(scope="module", params=["dynamic", "static"])
def in_int8(request, tmp_path_factory):
    """A model without `REMOVED`, folded; and the folder of its `model.onnx` and `int8.onnx`."""
    model, folder = small_model(), tmp_path_factory.mktemp("int8")
    STATES["folded"](model)
    export_onnx(model.eval(), folder / "model.onnx")
    images = torch.randn(40, 3, 16, 16, generator=torch.Generator().manual_seed(7))
    quantize_onnx(folder / "model.onnx", folder / "int8.onnx", images if request.param == "static" else None)
    return model, folder


def test_int8_keeps_the_best_class_and_shrinks_the_file(in_int8):
    model, folder = in_int8
    images = torch.randn(40, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    check = compare_onnx(model, folder / "int8.onnx", images)
    assert check.num_images == 40 and check.agreement > 0.9
    assert 0 < check.max_difference < 1.0
    assert check.file_bytes < (folder / "model.onnx").stat().st_size
    assert len(_quantized_weights(folder / "int8.onnx")) >= 10


def test_int8_takes_the_linear_layers_and_nothing_else(in_int8):
    # Products of attention and sums of the stream stay in float, and so does what a linear layer gives.
    nodes = _graph_of_an_image(in_int8[1] / "int8.onnx").node
    num_linear = len(_quantized_weights(in_int8[1] / "int8.onnx"))
    constants = {one.name for one in _graph(in_int8[1] / "model.onnx").initializer}
    exact = [node for node in _graph(in_int8[1] / "model.onnx").node if node.op_type in ("MatMul", "Gemm")]
    assert num_linear == sum(node.input[1] in constants for node in exact) < len(exact)
    given = {
        name for node in nodes if node.op_type.startswith("MatMul") or node.op_type == "Gemm" for name in node.output
    }
    rounded = [node.input[0] for node in nodes if node.op_type in ("QuantizeLinear", "DynamicQuantizeLinear")]
    assert 0 < len(rounded) <= num_linear and not given & set(rounded)


@pytest.mark.parametrize("is_static", [False, True])
def test_layers_can_be_kept_in_float_by_name(in_int8, tmp_path, is_static):
    source, images = in_int8[1] / "model.onnx", torch.randn(4, 3, 16, 16) if is_static else None
    nodes = linear_nodes(source)
    kept = [list(nodes)[1], list(nodes)[-1]]  # a MatMul and the head, a Gemm
    quantize_onnx(source, tmp_path / "some.onnx", images, kept_in_float=kept)
    assert len(_quantized_weights(tmp_path / "some.onnx")) == len(nodes) - 2
    quantize_onnx(source, tmp_path / "none.onnx", images, kept_in_float=list(nodes))
    assert not _quantized_weights(tmp_path / "none.onnx")
    assert compare_onnx(in_int8[0], tmp_path / "none.onnx", torch.randn(5, 3, 16, 16)).max_difference < 1e-4
    with pytest.raises(ValueError, match="No linear layers of this file: mlp"):
        quantize_onnx(source, tmp_path / "other.onnx", images, kept_in_float=["mlp"])
    assert not (tmp_path / "other.onnx").exists()


def test_int8_logits_of_an_image_do_not_depend_on_its_batch(in_int8):
    session = onnxruntime.InferenceSession(in_int8[1] / "int8.onnx", providers=["CPUExecutionProvider"])
    images = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(2)).numpy()
    images[1] *= 10  # its activations would set the scale of all
    (together,) = session.run(None, {"pixel_values": images})
    alone = [session.run(None, {"pixel_values": image[None]})[0][0] for image in images]
    np.testing.assert_array_equal(together, alone)


def test_no_pair_of_int8_products_overflows_16_bits_on_a_cpu_without_vnni(in_int8):
    # vpmaddubsw of AVX2: two products of an unsigned activation and a signed weight, added in 16 bits, saturating.
    weights = _quantized_weights(in_int8[1] / "int8.onnx")
    assert len(weights) >= 10
    for name, weight in weights.items():
        pairs = np.abs(weight.astype(np.int64)).reshape(len(weight) // 2, 2, -1).sum(axis=1)
        assert 255 * pairs.max() <= np.iinfo(np.int16).max, name
    assert max(np.abs(weight.astype(np.int64)).max() for weight in weights.values()) >= 60, "bits are left unused"


def _quantized_weights(path) -> dict[str, np.ndarray]:
    """The constant `(inputs, outputs)` of every product of integers, or of numbers that come from integers."""
    from onnx import numpy_helper

    graph = _graph_of_an_image(path)
    constants = {one.name: numpy_helper.to_array(one) for one in graph.initializer}
    stored = {node.output[0]: node.input[0] for node in graph.node if node.op_type == "DequantizeLinear"}
    weights = {}
    for node in graph.node:
        if node.op_type in ("MatMulInteger", "MatMul", "Gemm"):
            name = stored.get(node.input[1], node.input[1])
            if name in constants and constants[name].dtype == np.int8:
                is_turned = any(one.name == "transB" and one.i for one in node.attribute)
                weights[name] = constants[name].T if is_turned else constants[name]
    return weights


def _graph_of_an_image(path):
    graph = _graph(path)
    return graph.node[0].attribute[0].g if graph.node[0].op_type == "Scan" else graph


def test_fixed_scales_are_those_of_the_calibration_images(removed, tmp_path):
    export_onnx(removed, tmp_path / "model.onnx")
    images = torch.randn(40, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    differences = []
    for name, calibration in {"same": images, "darker": images / 100}.items():
        quantize_onnx(tmp_path / "model.onnx", tmp_path / f"{name}.onnx", calibration)
        differences.append(compare_onnx(removed, tmp_path / f"{name}.onnx", images).max_difference)
    assert differences[0] < 0.5 * differences[1]
    with pytest.raises(ValueError, match="at least one"):
        quantize_onnx(tmp_path / "model.onnx", tmp_path / "none.onnx", images[:0])
    assert not (tmp_path / "none.onnx").exists()


def test_openvinos_file_gives_the_same_outputs_and_another_function_is_refused(removed, tmp_path, pixel_values):
    export_onnx(removed, tmp_path / "model.onnx")
    check = export_openvino(removed, tmp_path / "model.onnx", tmp_path / "openvino_model.xml", pixel_values)
    assert check.file == "openvino_model.xml" and check.max_difference < 1e-4 and check.agreement == 1.0
    files = [tmp_path / "openvino_model.xml", tmp_path / "openvino_model.bin"]
    assert check.file_bytes == sum(file.stat().st_size for file in files)
    with torch.no_grad():
        removed.classifier.bias.add_(0.1)
    with pytest.raises(ValueError, match="another function"):
        export_openvino(removed, tmp_path / "model.onnx", tmp_path / "other.xml", pixel_values)


def test_one_image_is_enough_and_none_is_refused(removed, tmp_path, pixel_values):
    check = export_program(removed.eval(), tmp_path / "model.pt2", pixel_values[:1])
    assert check.num_images == 1 and check.agreement == 1.0
    with pytest.raises(ValueError, match="at least one"):
        export_program(removed, tmp_path / "model.pt2", pixel_values[:0])


def test_a_new_head_is_not_exported(vit_folder, tmp_path):
    model = LambdaViTForImageClassification.from_pretrained(vit_folder, num_labels=3, ignore_mismatched_sizes=True)
    for write in (export_onnx, export_program):
        with pytest.raises(ValueError, match="head of this model is new"):
            write(model.eval(), tmp_path / "model")
    assert list(tmp_path.glob("model*")) == []


def _graph(path):
    import onnx

    return onnx.load(path).graph


def test_a_lambda_that_was_changed_in_its_buffer_is_exported(model, tmp_path, pixel_values):
    model(pixel_values)
    for index in REMOVED:
        model.encoder_layers[index].attention_lambda.fill_(0.0)
    exported = exported_program(model, pixel_values).module()
    assert torch.allclose(exported(pixel_values), model(pixel_values).logits, atol=1e-5)


@pytest.mark.parametrize("export_to", [export_onnx, export_program])
def test_images_of_another_size_are_refused_in_plain_words(model, tmp_path, export_to):
    with pytest.raises(ValueError, match=r"24\*24.*16\*16"):
        export_to(model, tmp_path / "model.onnx", torch.zeros(2, 3, 24, 24))
    assert not list(tmp_path.glob("model.onnx"))


@pytest.mark.parametrize("state", ["removed", "prepared", "merged"])
def test_an_encoder_gives_its_features_in_each_precision(state, tmp_path, pixel_values):
    torch.manual_seed(0)
    model = perturb(LambdaViTModel(LambdaViTConfig(**{**TINY, "num_hidden_layers": 3})))
    STATES[state](model)
    files = {name: tmp_path / f"{name}.onnx" for name in ("fp32", "fp16", "int8")}
    check = export_onnx(model, files["fp32"])
    assert check.max_difference < 1e-4 and check.agreement > 0.999999 and check.kind == "features"
    assert "largest difference of a feature" in str(check) and "mean cosine of tokens 1.000000" in str(check)
    halve_onnx(files["fp32"], files["fp16"])
    quantize_onnx(files["fp32"], files["int8"])
    seven = pixel_values.repeat(3, 1, 1, 1)[:7]
    with torch.no_grad():
        expected = model(seven)
    for name, tolerance in {"fp32": 1e-4, "fp16": 0.02, "int8": 0.3}.items():
        found = onnxruntime.InferenceSession(files[name], providers=["CPUExecutionProvider"])
        assert [one.name for one in found.get_outputs()] == ["last_hidden_state", "pooler_output"]
        for value, wanted in zip(found.run(None, {"pixel_values": seven.numpy()}), expected.values(), strict=True):
            np.testing.assert_allclose(value, wanted, rtol=0, atol=tolerance)
        assert (compare_onnx(model, files[name], seven).max_difference > 1e-4) == (name != "fp32")


@pytest.mark.parametrize("state", ["prepared", "merged", "merged, as many as can"])
def test_an_encoder_without_pooler_runs_in_every_engine(state, tmp_path, pixel_values):
    torch.manual_seed(0)
    model = perturb(LambdaDinov2Model(LambdaDinov2Config(**TINY)))
    STATES[state](model)
    with torch.no_grad():
        expected = model(pixel_values).last_hidden_state
    assert export_program(model, tmp_path / "model.pt2").agreement > 0.999999
    export_onnx(model, tmp_path / "model.onnx")
    for run in (run_session(tmp_path / "model.onnx"), run_openvino(openvino_core(), tmp_path / "model.onnx", "fp32")):
        torch.testing.assert_close(run(pixel_values), expected, rtol=1e-4, atol=1e-4)


def test_a_difference_in_the_second_output_counts(tmp_path, pixel_values):
    model = perturb(LambdaViTModel(LambdaViTConfig(**{**TINY, "num_hidden_layers": 1})))
    export_onnx(model, tmp_path / "model.onnx")
    with torch.no_grad():
        model.pooler.dense.bias.add_(0.5)
    check = compare_onnx(model, tmp_path / "model.onnx", pixel_values)
    assert check.max_difference > 0.01 and check.agreement > 0.999999
    with torch.no_grad():
        model.pooler.dense.bias.fill_(float("nan"))
    assert np.isnan(compare_onnx(model, tmp_path / "model.onnx", pixel_values).max_difference)


def test_an_encoder_that_lacks_tokens_is_refused(removed, tmp_path):
    with pytest.raises(ValueError, match="prepared within a classifier"):
        export_onnx(removed.prepare_for_inference().base_model, tmp_path / "model.onnx")


def test_what_gives_neither_logits_nor_features_is_refused(tmp_path):
    model = LambdaViTBackbone(LambdaViTConfig(**TINY)).eval()
    with pytest.raises(ValueError, match="Only classifiers and encoders are exported: BackboneOutput has neither"):
        export_onnx(model, tmp_path / "model.onnx")


@pytest.mark.parametrize(
    ("problem_type", "agreement"),
    [(None, 0.75), ("multi_label_classification", 0.75), ("regression", 1 - (15.5 / 25) ** 0.5)],
)
def test_agreement_is_of_what_the_logits_say(problem_type, agreement, tmp_path):
    expected = torch.tensor([[2.0, -1.0], [2.0, 1.0], [-1.0, 2.0], [1.0, 3.0]])
    found = torch.tensor([[2.0, -1.0], [2.0, -0.5], [0.0, 2.0], [1.0, -0.5]])  # rows 1 and 3 lose a label, 3 the class
    model = nn.Identity()
    model.forward = lambda images: {"logits": expected[images[:, 0].long()]}
    model.config = ViTConfig(num_labels=2, problem_type=problem_type)
    (tmp_path / "graph").write_bytes(b"")
    check = compare_outputs(model, lambda images: [found[images[:, 0].long()]], torch.arange(4.0)[:, None],
                            tmp_path / "graph", batch_size=2)  # fmt: skip
    assert check.agreement == pytest.approx(agreement) and check.max_difference == 3.5
