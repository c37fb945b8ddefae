"""The exported folder: the Hub's layout, and the same answers with neither PyTorch nor transformers."""

import copy
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import PIL.Image
import pytest
import torch
from sklearn.datasets import load_sample_images
from transformers import AutoConfig, AutoImageProcessor, ViTImageProcessor

from lambda_vit_hf import LambdaDinov2Config, LambdaDinov2ForImageClassification
from lambda_vit_hf.data import decoding
from lambda_vit_hf.data.decoding import UnreadableImageError
from lambda_vit_hf.export import serving_folder
from lambda_vit_hf.export.onnx import compare_onnx
from lambda_vit_hf.export.onnx_serving import OnnxImageClassifier
from lambda_vit_hf.export.preprocessing import describe_preprocessing
from lambda_vit_hf.export.serving_folder import describe_graph, export_for_serving
from lambda_vit_hf.hub.exported_folder import EXPORTED_FILES, check_exported_folder
from tests.conftest import REMOVED


PROCESSORS = {
    "square": dict(size={"height": 16, "width": 16}),
    "crop": dict(size={"shortest_edge": 20}, do_center_crop=True, crop_size={"height": 16, "width": 16}, resample=3),
    "plain": dict(size={"height": 16, "width": 16}, do_normalize=False, resample=0),
    "bytes": dict(size={"height": 16, "width": 16}, do_rescale=False, image_mean=[120, 110, 100], image_std=[0.5] * 3),
}


@pytest.fixture(scope="module")
def photographs():
    return [PIL.Image.fromarray(image) for image in load_sample_images().images]


def with_preprocessing(kind) -> OnnxImageClassifier:
    classifier = OnnxImageClassifier.__new__(OnnxImageClassifier)
    classifier.preprocessing = json.loads(json.dumps(describe_preprocessing(ViTImageProcessor(**PROCESSORS[kind]))))
    return classifier


@pytest.mark.parametrize("kind", PROCESSORS)
def test_preprocessing_without_transformers_gives_the_same_pixels(kind, photographs):
    processor = ViTImageProcessor(**PROCESSORS[kind])
    classifier = with_preprocessing(kind)
    for photograph in photographs:
        wide = photograph.crop((0, 0, 301, 200))
        for image in (photograph, wide, wide.rotate(90, expand=True)):
            expected = processor(image, return_tensors="np")["pixel_values"][0]
            found = classifier.preprocess(image)
            assert found.shape == expected.shape and found.dtype == np.float32
            # Pillow and torchvision round resized bytes differently, by one of 255 here and there.
            step = (1 / 255 if processor.do_rescale else 1) / (0.5 if processor.do_normalize else 1.0)
            assert np.abs(found - expected).max() < 1.01 * step * (2 if kind == "crop" else 1)


def test_odd_pictures_are_served_too(photographs):
    classifier = with_preprocessing("square")
    gray = photographs[0].convert("L")
    deep = PIL.Image.fromarray(np.asarray(gray).astype(np.uint16) * 257)
    expected = classifier.preprocess(gray.convert("RGB"))
    for image in (gray, deep, gray.convert("P"), gray.convert("LA"), gray.convert("CMYK")):
        np.testing.assert_allclose(classifier.preprocess(image), expected, atol=0.05)


def test_a_picture_of_too_many_pixels_is_not_served():
    classifier = with_preprocessing("square")
    with pytest.raises(UnreadableImageError, match="20000 x 20000"):
        classifier.preprocess(PIL.Image.new("1", (20000, 20000)))


def test_a_rotated_picture_is_turned_upright(photographs, tmp_path):
    classifier = with_preprocessing("square")
    lying = photographs[0].rotate(90, expand=True)
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # orientation: turn by 90 degrees clockwise to see it upright
    lying.save(tmp_path / "lying.png", exif=exif)
    with PIL.Image.open(tmp_path / "lying.png") as picture:
        np.testing.assert_array_equal(classifier.preprocess(picture), classifier.preprocess(photographs[0]))


def test_deep_and_floating_point_pictures_are_served_as_they_were_read_in_training(photographs):
    classifier = with_preprocessing("square")
    gray = np.asarray(photographs[0].convert("L"))
    expected = classifier.preprocess(photographs[0].convert("L"))
    pictures = {"I": gray.astype(np.int32) * 257, "F in 255ths": gray / np.float32(1), "F": gray / np.float32(255)}
    for name, values in pictures.items():
        found = classifier.preprocess(PIL.Image.fromarray(values))
        np.testing.assert_allclose(found, expected, atol=0.05, err_msg=name)


def test_exif_data_of_a_wrong_type_do_not_stop_the_server(photographs, tmp_path):
    classifier = with_preprocessing("square")
    exif = PIL.Image.Exif()
    exif[0x0112], exif[0x011A] = 6, 72.0  # orientation, and a resolution
    damaged = exif.tobytes().replace(b"\x01\x1a\x00\x05", b"\x01\x1a\x00\x01")  # written as a byte
    assert damaged != exif.tobytes()
    photographs[0].rotate(90, expand=True).save(tmp_path / "lying.png", exif=damaged)
    with PIL.Image.open(tmp_path / "lying.png") as picture:
        np.testing.assert_array_equal(classifier.preprocess(picture), classifier.preprocess(photographs[0]))


SERVE = """
import sys

for name in ("torch", "torchvision", "transformers", "lambda_vit_hf", "onnx"):
    sys.modules[name] = None  # as if it were not installed
import json
import numpy as np
import PIL.Image
from serve import OnnxImageClassifier

classifier = OnnxImageClassifier(".", num_threads=1)
pictures = [PIL.Image.open(path) for path in sys.argv[1:]]
print(json.dumps({"logits": classifier.logits(pictures).tolist(), "best": classifier.classify(pictures, top_k=2)}))
"""


@pytest.fixture(scope="module")
def served(made_once, tmp_path_factory):
    """A model without `REMOVED`, folded; its exported folder, in all precisions; and how near they are."""
    model = copy.deepcopy(made_once.model)
    model.remove_attention(REMOVED)
    model.fold_removed_attention()
    model.config.id2label = dict(enumerate(["ä", "b", "c", "d", "e"]))
    processor, folder = ViTImageProcessor(**PROCESSORS["crop"]), tmp_path_factory.mktemp("export") / "new" / "served"
    checks = export_for_serving(model.eval(), processor, folder, int8=True, fp16=True)
    return SimpleNamespace(model=model, processor=processor, folder=folder, checks=checks)


@pytest.fixture
def exported_before(served, monkeypatch):
    """Exporting takes the graph of `served`: for tests of what comes after."""

    def export(model, path, images=None):
        shutil.copyfile(served.folder / "onnx" / "model.onnx", path)
        return served.checks[0]

    monkeypatch.setattr(serving_folder, "export_onnx", export)


def test_the_folder_serves_without_pytorch_and_transformers(served, tmp_path, photographs):
    model, folder = served.model, shutil.copytree(served.folder, tmp_path / "served")
    assert served.checks[0].file == "model.onnx" and served.checks[0].max_difference < 1e-4
    decoding_served = (folder / "decoding.py").read_bytes()
    assert decoding_served == Path(decoding.__file__).read_bytes(), "pictures are decoded as in training"
    paths = []
    for index, photograph in enumerate(photographs):
        paths.append(str(tmp_path / f"{index}.png"))
        photograph.save(paths[-1])

    def run(*command):
        environment = {**os.environ, "PYTHONPATH": ""}
        result = subprocess.run([sys.executable, *command, *paths], cwd=folder, env=environment,
                                capture_output=True, text=True)  # fmt: skip
        assert result.returncode == 0, result.stderr[-2000:]
        return result.stdout

    answer = json.loads(run("-c", SERVE))
    with torch.no_grad():
        expected = model(served.processor(photographs, return_tensors="pt")["pixel_values"]).logits.numpy()
    np.testing.assert_allclose(answer["logits"], expected, atol=0.05)  # pixels differ by one of 255 here and there
    best = expected.argmax(axis=1)
    assert [one[0]["label"] for one in answer["best"]] == [model.config.id2label[index] for index in best]
    assert all(len(one) == 2 and one[0]["score"] > one[1]["score"] > 0 for one in answer["best"])
    printed = run("serve.py")
    assert f"{paths[0]}: {model.config.id2label[best[0]]} (" in printed
    assert "pip install onnxruntime numpy pillow" in (folder / "README.md").read_text()


def files_of(folder) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


OPENVINO = {"openvino/openvino_model.xml", "openvino/openvino_model.bin"}  # on request: tests/cli/test_export.py


def test_the_layout_is_that_of_the_hub(served):
    model, processor, folder = served.model, served.processor, served.folder
    assert [check.file for check in served.checks] == ["model.onnx", "model_fp16.onnx", "model_quantized.onnx"]
    assert files_of(folder) == set(EXPORTED_FILES) - OPENVINO, "and a push sends all of it"
    assert [path.name for path in folder.parent.iterdir()] == ["served"], "nothing is left of the work"
    config = AutoConfig.from_pretrained(folder)
    assert config.model_type == "vit" and config.architectures == ["ViTForImageClassification"]
    assert config.id2label == model.config.id2label and config.image_size == model.config.image_size
    own = json.loads((folder / config.lambda_config).read_text())
    assert own["model_type"] == "lambda_vit" and own["attention_flags"] == model.config.attention_flags
    found, expected = (one.to_dict() for one in (AutoImageProcessor.from_pretrained(folder), processor))
    assert {name: found[name] for name in expected} == expected


def test_the_graph_takes_images_of_the_size_that_the_processor_makes(tmp_path, photographs):
    # As of DINOv2: trained on images of 518 pixels, given images of 224.
    shape = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=56, patch_size=14)
    model = LambdaDinov2ForImageClassification(LambdaDinov2Config(**shape)).eval()
    crop = dict(size={"shortest_edge": 32}, do_center_crop=True, crop_size={"height": 28, "width": 28})
    with pytest.raises(ValueError, match=r"makes images of \(28, 28\) pixels, but `images` are of \(56, 56\)"):
        export_for_serving(model, ViTImageProcessor(**crop), tmp_path / "served", torch.zeros(1, 3, 56, 56))
    export_for_serving(model, ViTImageProcessor(**crop), tmp_path / "served")
    assert OnnxImageClassifier(tmp_path / "served").logits(photographs).shape == (2, 2)
    assert json.loads((tmp_path / "served" / "config.json").read_text())["image_size"] == 28


def test_a_processor_whose_images_the_model_cannot_take_is_refused(removed, tmp_path):
    with pytest.raises(ValueError, match=r"size \(20\*20\) doesn't match model"):
        export_for_serving(removed.eval(), ViTImageProcessor(size={"height": 20, "width": 20}), tmp_path / "served")
    assert list(tmp_path.glob("served")) == []


@pytest.mark.parametrize("int8", [False, True])
def test_a_browser_finds_the_file_that_transformers_js_takes_by_default(removed, int8):
    # In a browser `model_quantized.onnx`, unless the config names another precision.
    wanted = describe_graph(removed.config, int8).get("transformers.js_config", {"dtype": "q8"})["dtype"]
    assert wanted == ("q8" if int8 else "fp32")


def test_float16_takes_and_gives_float32(served, pixel_values):
    exact, halved = (served.folder / "onnx" / name for name in ("model.onnx", "model_fp16.onnx"))
    check = compare_onnx(served.model, halved, pixel_values)
    assert 0 < check.max_difference < 0.02 and check.file_bytes < exact.stat().st_size
    weights = [one for one in onnx.load(halved).graph.initializer if len(one.dims) == 2]
    assert weights and {one.data_type for one in weights} == {onnx.TensorProto.FLOAT16}


def test_an_export_that_stops_half_way_leaves_nothing_that_looks_like_one(
    removed, exported_before, tmp_path, monkeypatch
):
    monkeypatch.setattr(serving_folder, "write_checksums", lambda folder: 1 / 0)
    folder = tmp_path / "new" / "served"
    folder.mkdir(parents=True)
    with pytest.raises(ZeroDivisionError):
        export_for_serving(removed.eval(), ViTImageProcessor(**PROCESSORS["square"]), folder)
    assert list(folder.parent.rglob("*")) == [folder]


def test_a_folder_in_int8_is_refused_where_it_spoils_the_answers(removed, exported_before, tmp_path, monkeypatch):
    processor = ViTImageProcessor(**PROCESSORS["square"])
    images = torch.randn(10, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    monkeypatch.setattr(serving_folder, "LEAST_AGREEMENT", 1.01)
    with pytest.raises(ValueError, match="8 bits are too few"):
        export_for_serving(removed.eval(), processor, tmp_path / "served", images, int8=True)
    assert not (tmp_path / "served").exists()
    monkeypatch.setattr(serving_folder, "LEAST_AGREEMENT", 0.5)
    _, check = export_for_serving(removed.eval(), processor, tmp_path / "served", images, int8=True)
    assert check.num_images == 10 and str(check) in (tmp_path / "served" / "README.md").read_text()
    with pytest.raises(FileExistsError, match="not an empty folder"):
        export_for_serving(removed.eval(), processor, tmp_path / "served")


def test_an_answer_in_int8_does_not_depend_on_the_other_pictures(served, photographs):
    classifier = OnnxImageClassifier(served.folder, "onnx/model_quantized.onnx", num_threads=1)
    white = PIL.Image.new("RGB", (16, 16), "white")
    together = classifier.logits([photographs[0], white, photographs[1]])
    alone = [classifier.logits([picture])[0] for picture in (photographs[0], white, photographs[1])]
    np.testing.assert_array_equal(together, alone)


SERVED = ["onnx/model.onnx", "onnx/model_quantized.onnx", "config.json", "preprocessor_config.json", "serve.py",
          "decoding.py", "checksums.py"]  # fmt: skip


@pytest.mark.parametrize("name", SERVED)
def test_a_damaged_or_swapped_file_is_not_served(served, tmp_path, name):
    folder = shutil.copytree(served.folder, tmp_path / "served")
    content = bytearray((folder / name).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / name).write_bytes(content)
    with pytest.raises(OSError, match=f"{name}: not the content that SHA256SUMS lists"):
        OnnxImageClassifier(folder)


def test_a_model_that_fades_is_refused(removed, tmp_path):
    kept = next(i for i, layer in enumerate(removed.encoder_layers) if layer.has_attention)
    removed.set_attention_lambda(0.5, [kept])
    with pytest.raises(ValueError, match=f"between 0 and 1: {{{kept}: 0.5}}"):
        export_for_serving(removed, ViTImageProcessor(**PROCESSORS["square"]), tmp_path / "served")
    assert not (tmp_path / "served").exists()


def test_an_encoder_is_served_as_one_and_classifies_nothing(removed, tmp_path):
    folder = tmp_path / "served"
    checks = export_for_serving(removed.base_model, ViTImageProcessor(**PROCESSORS["square"]), folder, int8=True)
    assert [check.file for check in checks] == ["model.onnx", "model_quantized.onnx"]
    assert files_of(folder) == set(EXPORTED_FILES) - OPENVINO - {
        "serve.py", "decoding.py", "checksums.py", "onnx/model_fp16.onnx"
    }  # fmt: skip
    assert {path.relative_to(folder).as_posix() for path in check_exported_folder(folder)} == files_of(folder)
    config = json.loads((folder / "config.json").read_text())
    assert (config["model_type"], config["architectures"]) == ("vit", ["ViTModel"]) and "id2label" not in config
    readme = (folder / "README.md").read_text()
    assert "pipeline_tag: image-feature-extraction" in readme and "serve.py" not in readme
    with pytest.raises(ValueError, match="served holds an encoder without class head"):
        OnnxImageClassifier(folder)


def test_an_encoder_in_int8_is_refused_where_its_features_turn(removed, tmp_path, monkeypatch):
    processor, images = ViTImageProcessor(**PROCESSORS["square"]), torch.randn(4, 3, 16, 16)
    monkeypatch.setattr(serving_folder, "LEAST_AGREEMENT", 1.01)
    with pytest.raises(ValueError, match="8 bits are too few"):
        export_for_serving(removed.base_model, processor, tmp_path / "served", images, int8=True)
    assert not (tmp_path / "served").exists()
