"""`lambda-vit export`: what it writes, what it needs, what it refuses."""

import sys

import onnx
import PIL.Image
import pytest
import torch
from onnxruntime import InferenceSession
from transformers import ViTImageProcessor, pipeline

from lambda_vit_hf import LambdaViTConfig, LambdaViTForImageClassification, LambdaViTModel
from lambda_vit_hf.cli import export
from lambda_vit_hf.cli.runner import missing_extra, run_program
from lambda_vit_hf.export.onnx_serving import OnnxImageClassifier
from lambda_vit_hf.hub.exported_folder import check_exported_folder
from tests.conftest import TINY, perturb


@pytest.fixture
def shallow(tmp_path):
    """A removed and folded model of fewer layers than elsewhere: exporting takes long."""
    torch.manual_seed(0)
    model = perturb(LambdaViTForImageClassification(LambdaViTConfig(**{**TINY, "num_hidden_layers": 3})))
    model.remove_attention([0])
    model.fold_removed_attention()
    model.save_pretrained(tmp_path / "shallow")
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(tmp_path / "shallow")
    return tmp_path / "shallow"


def test_export_writes_the_folder_and_says_what_it_compared(shallow, tmp_path, capsys):
    export.main([str(shallow), "--output_dir", str(tmp_path / "served"), "--token_merging_r", "2", "--fp16"])
    printed = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in printed[:2]] == ["model.onnx", "model_fp16.onnx"]
    assert all("largest difference of a logit" in line for line in printed[:2])
    assert (tmp_path / "served" / "serve.py").is_file()
    export.main([str(shallow), "--output_dir", str(tmp_path / "program"), "--format", "torch_export"])
    assert (tmp_path / "program" / "model.pt2").is_file()
    for taken in (tmp_path / "served", tmp_path / "served" / "serve.py"):
        with pytest.raises(FileExistsError, match="not an empty folder"):
            export.main([str(shallow), "--output_dir", str(taken)])


def test_every_kind_of_file_is_in_one_folder_and_pushed(shallow, tmp_path, capsys):
    out = tmp_path / "served"
    export.main([str(shallow), "--output_dir", str(out), "--openvino", "--int8", "--int8_scales", "static",
                 "--dataset_name", "digits", "--num_images", "20", "--num_calibration_images", "20"])  # fmt: skip
    printed = capsys.readouterr().out
    assert "openvino_model.xml" in printed and "model_quantized.onnx" in printed
    names = {str(path.relative_to(out)) for path in check_exported_folder(out)}
    assert names >= {"onnx/model_quantized.onnx", "openvino/openvino_model.xml", "openvino/openvino_model.bin"}
    assert "Scan" not in {node.op_type for node in onnx.load(out / "onnx" / "model_quantized.onnx").graph.node}


def test_openvino_that_is_not_installed_is_named_before_the_model_is_read(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(SystemExit) as stopped:
        run_program("export", export.main, ["/no/model", "--output_dir", str(tmp_path / "out"), "--openvino"])
    assert stopped.value.code == 2
    assert "pip install 'lambda-vit-hf[openvino]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--int8_scales", "static"], "--int8_scales goes with --int8"),
        (["--int8", "--int8_scales", "static"], "name a dataset"),
        (["--num_calibration_images", "0"], "must be at least 1"),
    ],
)
def test_options_of_int8_that_cannot_be_are_refused(tmp_path, options, said, capsys):
    with pytest.raises(SystemExit):
        export.main(["model", "--output_dir", str(tmp_path), *options])
    assert said in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("option", ["--int8", "--fp16", "--openvino"])
def test_smaller_weights_are_for_onnx(tmp_path, option):
    with pytest.raises(SystemExit):
        export.main(["model", "--output_dir", str(tmp_path), "--format", "torch_export", option])


@pytest.mark.parametrize("library", ["onnx", "onnxruntime", "onnxscript"])
def test_a_missing_library_is_found_before_the_work(tmp_path, monkeypatch, library):
    monkeypatch.setitem(sys.modules, library, None)  # as if it were not installed
    with pytest.raises(ImportError, match=library) as missing:
        export.main(["no/model", "--output_dir", str(tmp_path / "out")])
    assert "'lambda-vit-hf[export]'" in missing_extra(missing.value)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_file_in_place_of_its_folder_is_named(shallow, tmp_path, name):
    with pytest.raises(OSError, match=f"{name} is a file: name the folder"):
        export.main([str(shallow / name), "--output_dir", str(tmp_path / "out")])


def test_one_image_is_enough_to_compare_on(shallow, tmp_path, capsys):
    export.main([str(shallow), "--output_dir", str(tmp_path / "out"), "--format", "torch_export",
                 "--dataset_name", "digits", "--num_images", "1"])  # fmt: skip
    assert "on 1 images" in capsys.readouterr().out


def test_a_model_whose_head_was_never_trained_is_refused(model, folder, tmp_path):
    model.config.num_labels = 3
    model.config.save_pretrained(folder)
    with pytest.raises(ValueError, match=r"classifier\.bias.*Train it first"):
        export.main([str(folder), "--output_dir", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("has_pooler", [False, True])
def test_an_encoder_is_exported_with_what_its_checkpoint_has(model, tmp_path, capsys, has_pooler):
    model.remove_attention([0])
    LambdaViTModel(model.config, add_pooling_layer=has_pooler).save_pretrained(tmp_path / "encoder")
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(tmp_path / "encoder")
    export.main([str(tmp_path / "encoder"), "--output_dir", str(tmp_path / "out")])
    assert "largest difference of a feature" in capsys.readouterr().out
    session = InferenceSession(tmp_path / "out" / "onnx" / "model.onnx", providers=["CPUExecutionProvider"])
    names = ["last_hidden_state", *["pooler_output"] * has_pooler]  # a pooler that is not there would be random
    assert [one.name for one in session.get_outputs()] == names


@pytest.mark.parametrize(
    ("problem_type", "said"),
    [("multi_label_classification", "100.0 % of the labels the same"), ("regression", "root mean square difference")],
)
def test_scores_are_what_the_pipeline_gives_also_of_labels_and_values(shallow, tmp_path, capsys, problem_type, said):
    model = LambdaViTForImageClassification.from_pretrained(shallow)
    model.config.problem_type = problem_type
    model.save_pretrained(shallow)
    export.main([str(shallow), "--output_dir", str(tmp_path / "served"), "--int8"])
    printed = capsys.readouterr().out
    assert (
        printed.count("root mean" if problem_type == "regression" else "of the labels the same") == 2
        and said in printed
    )
    assert "takes their softmax" in printed and "takes their softmax" in (tmp_path / "served/README.md").read_text()
    pictures = [PIL.Image.new("RGB", (16, 16), color) for color in ("red", "black", "white")]
    classifier = pipeline(
        "image-classification", model=model, image_processor=ViTImageProcessor.from_pretrained(shallow)
    )
    served = OnnxImageClassifier(tmp_path / "served").classify(pictures)
    for found, expected in zip(served, classifier(pictures), strict=True):
        assert [one["label"] for one in found] == [one["label"] for one in expected]
        scores = [one["score"] for one in expected]
        assert [one["score"] for one in found] == pytest.approx(scores, abs=1e-4)
        assert sum(scores) != pytest.approx(1, abs=1e-3), "no softmax"
