"""The comparison of ways to int8."""

import json

import pytest
import torch

from benchmarks import quantization
from lambda_vit_hf.export.onnx import export_onnx
from lambda_vit_hf.export.variants import run_session


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
    quantization.main(["--show", str(output)])
    assert capsys.readouterr().out in printed


def test_percentiles_leave_out_what_is_rare(model, tmp_path):
    images = torch.randn(32, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    export_onnx(model, tmp_path / "model.onnx", images)
    for name, quantize in quantization.METHODS.items():
        quantize(tmp_path / "model.onnx", tmp_path / f"{name}.onnx", images)
    widest, narrower = (run_session(tmp_path / f"{name}.onnx")(images) for name in quantization.METHODS)
    assert (widest - narrower).abs().max() > 0


def test_without_a_model_it_says_so(capsys):
    with pytest.raises(SystemExit):
        quantization.main([])
    assert "name a model" in capsys.readouterr().err
