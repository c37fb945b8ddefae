"""The folder to serve: the same answers, with neither PyTorch nor transformers."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from sklearn.datasets import load_sample_images
from transformers import ViTImageProcessor

from lambda_vit_hf import LambdaViTConfig, LambdaViTForImageClassification
from lambda_vit_hf.data import decoding
from lambda_vit_hf.data.decoding import UnreadableImageError
from lambda_vit_hf.export import serving_folder
from lambda_vit_hf.export.onnx_serving import OnnxImageClassifier
from lambda_vit_hf.export.serving_folder import describe_preprocessing, export_for_serving
from tests.conftest import TINY, perturb


PROCESSORS = {
    "square": dict(size={"height": 16, "width": 16}),
    "crop": dict(size={"shortest_edge": 20}, do_center_crop=True, crop_size={"height": 16, "width": 16}, resample=3),
    "plain": dict(size={"height": 16, "width": 16}, do_normalize=False, resample=0),
}


@pytest.fixture(scope="module")
def photographs():
    return [PIL.Image.fromarray(image) for image in load_sample_images().images]


@pytest.mark.parametrize("kind", PROCESSORS)
def test_preprocessing_without_transformers_gives_the_same_pixels(kind, photographs):
    processor = ViTImageProcessor(**PROCESSORS[kind])
    classifier = OnnxImageClassifier.__new__(OnnxImageClassifier)
    classifier.preprocessing = json.loads(json.dumps(describe_preprocessing(processor, ["a"])))
    for photograph in photographs:
        wide = photograph.crop((0, 0, 301, 200))
        for image in (photograph, wide, wide.rotate(90, expand=True)):
            expected = processor(image, return_tensors="np")["pixel_values"][0]
            found = classifier.preprocess(image)
            assert found.shape == expected.shape and found.dtype == np.float32
            # Pillow and torchvision round resized bytes differently, by one of 255 here and there.
            step = 1 / 255 / (0.5 if processor.do_normalize else 1.0)
            assert np.abs(found - expected).max() < 1.01 * step * (2 if kind == "crop" else 1)


def test_odd_pictures_are_served_too(photographs):
    classifier = OnnxImageClassifier.__new__(OnnxImageClassifier)
    classifier.preprocessing = describe_preprocessing(ViTImageProcessor(**PROCESSORS["square"]), ["a"])
    gray = photographs[0].convert("L")
    deep = PIL.Image.fromarray(np.asarray(gray).astype(np.uint16) * 257)
    expected = classifier.preprocess(gray.convert("RGB"))
    for image in (gray, deep, gray.convert("P"), gray.convert("LA"), gray.convert("CMYK")):
        np.testing.assert_allclose(classifier.preprocess(image), expected, atol=0.05)


def test_a_picture_of_too_many_pixels_is_not_served():
    classifier = OnnxImageClassifier.__new__(OnnxImageClassifier)
    classifier.preprocessing = describe_preprocessing(ViTImageProcessor(**PROCESSORS["square"]), ["a"])
    with pytest.raises(UnreadableImageError, match="20000 x 20000"):
        classifier.preprocess(PIL.Image.new("1", (20000, 20000)))


def test_a_rotated_picture_is_turned_upright(photographs, tmp_path):
    classifier = OnnxImageClassifier.__new__(OnnxImageClassifier)
    classifier.preprocessing = describe_preprocessing(ViTImageProcessor(**PROCESSORS["square"]), ["a"])
    lying = photographs[0].rotate(90, expand=True)
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # orientation: turn by 90 degrees clockwise to see it upright
    lying.save(tmp_path / "lying.png", exif=exif)
    with PIL.Image.open(tmp_path / "lying.png") as picture:
        np.testing.assert_array_equal(classifier.preprocess(picture), classifier.preprocess(photographs[0]))


def test_deep_and_floating_point_pictures_are_served_as_they_were_read_in_training(photographs):
    classifier = OnnxImageClassifier.__new__(OnnxImageClassifier)
    classifier.preprocessing = describe_preprocessing(ViTImageProcessor(**PROCESSORS["square"]), ["a"])
    gray = np.asarray(photographs[0].convert("L"))
    expected = classifier.preprocess(photographs[0].convert("L"))
    pictures = {"I": gray.astype(np.int32) * 257, "F in 255ths": gray / np.float32(1), "F": gray / np.float32(255)}
    for name, values in pictures.items():
        found = classifier.preprocess(PIL.Image.fromarray(values))
        np.testing.assert_allclose(found, expected, atol=0.05, err_msg=name)


def test_exif_data_of_a_wrong_type_do_not_stop_the_server(photographs, tmp_path):
    classifier = OnnxImageClassifier.__new__(OnnxImageClassifier)
    classifier.preprocessing = describe_preprocessing(ViTImageProcessor(**PROCESSORS["square"]), ["a"])
    exif = PIL.Image.Exif()
    exif[0x0112], exif[0x011A] = 6, 72.0  # orientation, and a resolution
    damaged = exif.tobytes().replace(b"\x01\x1a\x00\x05", b"\x01\x1a\x00\x01")  # written as a byte
    assert damaged != exif.tobytes()
    photographs[0].rotate(90, expand=True).save(tmp_path / "lying.png", exif=damaged)
    with PIL.Image.open(tmp_path / "lying.png") as picture:
        np.testing.assert_array_equal(classifier.preprocess(picture), classifier.preprocess(photographs[0]))


def test_a_processor_that_cannot_be_described_is_refused():
    with pytest.raises(ValueError, match="longest_edge"):
        describe_preprocessing(ViTImageProcessor(size={"shortest_edge": 16, "longest_edge": 20}), ["a"])


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


def test_the_folder_serves_without_pytorch_and_transformers(removed, tmp_path, photographs):
    removed.config.id2label = dict(enumerate(["ä", "b", "c", "d", "e"]))
    processor = ViTImageProcessor(**PROCESSORS["square"])
    check = export_for_serving(removed.eval(), processor, tmp_path / "served")
    assert check.file == "model.onnx" and check.max_difference < 1e-4
    names = ["README.md", "SHA256SUMS", "checksums.py", "decoding.py", "model.onnx", "preprocessing.json", "serve.py"]
    assert sorted(path.name for path in (tmp_path / "served").iterdir()) == names
    decoding_served = (tmp_path / "served" / "decoding.py").read_bytes()
    assert decoding_served == Path(decoding.__file__).read_bytes(), "pictures are decoded as in training"
    paths = []
    for index, photograph in enumerate(photographs):
        paths.append(str(tmp_path / f"{index}.png"))
        photograph.save(paths[-1])

    def run(*command):
        environment = {**os.environ, "PYTHONPATH": ""}
        result = subprocess.run([sys.executable, *command, *paths], cwd=tmp_path / "served", env=environment,
                                capture_output=True, text=True)  # fmt: skip
        assert result.returncode == 0, result.stderr[-2000:]
        return result.stdout

    answer = json.loads(run("-c", SERVE))
    with torch.no_grad():
        expected = removed(processor(photographs, return_tensors="pt")["pixel_values"]).logits.numpy()
    np.testing.assert_allclose(answer["logits"], expected, atol=0.05)  # pixels differ by one of 255 here and there
    best = expected.argmax(axis=1)
    assert [one[0]["label"] for one in answer["best"]] == [removed.config.id2label[index] for index in best]
    assert all(len(one) == 2 and one[0]["score"] > one[1]["score"] > 0 for one in answer["best"])
    printed = run("serve.py")
    assert f"{paths[0]}: {removed.config.id2label[best[0]]} (" in printed
    assert "pip install onnxruntime numpy pillow" in Path(tmp_path / "served" / "README.md").read_text()


def test_a_folder_in_int8_is_refused_where_it_spoils_the_answers(removed, tmp_path, monkeypatch):
    processor = ViTImageProcessor(**PROCESSORS["square"])
    images = torch.randn(10, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    monkeypatch.setattr(serving_folder, "LEAST_AGREEMENT", 1.01)
    with pytest.raises(ValueError, match="8 bits are too few"):
        export_for_serving(removed.eval(), processor, tmp_path / "served", images, int8=True)
    assert not (tmp_path / "served" / "model.onnx").exists()
    monkeypatch.setattr(serving_folder, "LEAST_AGREEMENT", 0.5)
    check = export_for_serving(removed.eval(), processor, tmp_path / "served", images, int8=True)
    assert check.num_images == 10 and "8-bit" in (tmp_path / "served" / "README.md").read_text()
    with pytest.raises(FileExistsError, match="not an empty folder"):
        export_for_serving(removed.eval(), processor, tmp_path / "served")


@pytest.fixture(scope="module")
def in_int8(tmp_path_factory):
    torch.manual_seed(0)
    config = LambdaViTConfig(**{**TINY, "num_labels": 5})
    model = perturb(LambdaViTForImageClassification(config), size=0.3)
    folder = tmp_path_factory.mktemp("int8") / "served"
    export_for_serving(model, ViTImageProcessor(**PROCESSORS["square"]), folder, int8=True)
    return folder


def test_an_answer_in_int8_does_not_depend_on_the_other_pictures(in_int8, photographs):
    classifier = OnnxImageClassifier(in_int8, num_threads=1)
    white = PIL.Image.new("RGB", (16, 16), "white")
    together = classifier.logits([photographs[0], white, photographs[1]])
    alone = [classifier.logits([picture])[0] for picture in (photographs[0], white, photographs[1])]
    np.testing.assert_array_equal(together, alone)
    pixels = np.stack([classifier.preprocess(picture) for picture in (photographs[0], white)])
    (batch,) = classifier.session.run(["logits"], {"pixel_values": pixels})
    assert np.abs(batch[0] - alone[0]).max() > 0, "if onnxruntime mends this, batches may run at once"
    assert "one by one" in (in_int8 / "README.md").read_text()


@pytest.mark.parametrize("name", ["model.onnx", "preprocessing.json", "serve.py", "decoding.py", "checksums.py"])
def test_a_damaged_or_swapped_file_is_not_served(in_int8, tmp_path, name):
    folder = shutil.copytree(in_int8, tmp_path / "served")
    content = bytearray((folder / name).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / name).write_bytes(content)
    with pytest.raises(OSError, match=f"{name}: not the content that SHA256SUMS lists"):
        OnnxImageClassifier(folder)
