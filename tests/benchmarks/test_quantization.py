"""The comparison of ways to int8."""

import json

import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn

from benchmarks import quantization
from lambda_vit_hf.evaluation.classifier import load_classifier
from lambda_vit_hf.export.onnx import export_onnx
from lambda_vit_hf.models.families import AutoLambdaModelForImageClassification


def test_a_row_for_each_way_and_the_same_table_again(digits_vit, tmp_path, capsys, monkeypatch):
    output = tmp_path / "new" / "figures.json"
    quantization.main([digits_vit, "--dataset_name", "digits", "--num_images", "40", "--num_calibration_images", "16",
                       "--output", str(output)])  # fmt: skip
    printed = capsys.readouterr().out
    rows = json.loads(output.read_text())["rows"]
    assert [row["int8"] for row in rows if row["engine"] == "onnxruntime"] == [
        "fp32",
        "dynamic",
        *quantization.METHODS,
    ]
    assert {row["int8"] for row in rows if row["engine"] == "OpenVINO"} >= {"fp32", quantization.STATIC}
    assert (rows[0]["agreement"], rows[0]["speedup"]) == (1.0, 1.0)
    assert all(0 <= row["top1"] <= 1 and row["top1"] * 40 == pytest.approx(round(row["top1"] * 40)) for row in rows)
    for row in rows:
        exact = next(one for one in rows if (one["engine"], one["int8"]) == (row["engine"], "fp32"))
        assert row["won"] - row["lost"] == round(40 * (row["top1"] - exact["top1"]))
    quantization.main(["--show", str(output)])
    assert capsys.readouterr().out in printed


def test_only_the_default_can_be_asked_for(digits_vit, tmp_path):
    output = tmp_path / "figures.json"
    quantization.main([digits_vit, "--dataset_name", "digits", "--num_images", "40", "--num_calibration_images", "16",
                       "--only_dynamic", "--output", str(output)])  # fmt: skip
    rows = json.loads(output.read_text())["rows"]
    assert [(row["engine"], row["int8"]) for row in rows] == [("onnxruntime", "fp32"), ("onnxruntime", "dynamic")]


def test_each_linear_layer_has_a_row_by_its_name(digits_vit, tmp_path, capsys):
    output = tmp_path / "layers.json"
    quantization.main([digits_vit, "--dataset_name", "digits", "--num_images", "20", "--num_calibration_images", "8",
                       "--by_layer", "--output", str(output)])  # fmt: skip
    printed = capsys.readouterr().out
    rows = {row["layer"]: row for row in json.loads(output.read_text())["by_layer"]}
    model = load_classifier(digits_vit, model_class=AutoLambdaModelForImageClassification).prepare_for_inference()
    layers = {name for name, one in model.named_modules() if isinstance(one, nn.Linear)}
    assert {name.split(",")[0] for name in rows} == layers | {"all"} and len(rows) > len(layers), "a part or two"
    for way in ("dynamic", quantization.STATIC):
        assert rows["all"][way] > 0 and all(row[way] > -1e-6 for row in rows.values())
        assert max(row[way] for name, row in rows.items() if name != "all") < 2 * rows["all"][way]
    quantization.main(["--show", str(output)])
    assert capsys.readouterr().out in printed


def test_percentiles_leave_out_what_is_rare(model, tmp_path):
    images = torch.randn(32, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    export_onnx(model, tmp_path / "model.onnx", images)
    for name, quantize in quantization.METHODS.items():
        quantize(tmp_path / "model.onnx", tmp_path / f"{name}.onnx", images)
    widest, narrower = (scales_of_activations(tmp_path / f"{name}.onnx") for name in quantization.METHODS)
    assert widest.keys() == narrower.keys() and len(widest) >= 10
    assert all(narrower[name] <= widest[name] for name in widest) and widest != narrower


def scales_of_activations(path) -> dict[str, float]:
    """The scale that each activation is quantised by."""
    graph = onnx.load(path).graph
    constants = {one.name: numpy_helper.to_array(one) for one in graph.initializer}
    scales = {node.input[0]: constants[node.input[1]] for node in graph.node if node.op_type == "QuantizeLinear"}
    return {name: float(scale) for name, scale in scales.items() if scale.size == 1}


def test_without_a_model_it_says_so(capsys):
    with pytest.raises(SystemExit):
        quantization.main([])
    assert "name a model" in capsys.readouterr().err
