"""The folder to serve: the same answers, with neither PyTorch nor transformers."""

import inspect
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from sklearn.datasets import load_sample_images
from transformers import ViTImageProcessor

from lambda_vit_hf.data import decoding
from lambda_vit_hf.export import onnx_serving, serving_folder
from lambda_vit_hf.export.onnx_serving import OnnxImageClassifier
from lambda_vit_hf.export.serving_folder import describe_preprocessing, export_for_serving


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


def odd_pictures() -> dict[str, bytes]:
    """Files of every mode, orientation and kind of damaged EXIF data, by name."""
    y, x = np.mgrid[:24, :40]
    rgb = PIL.Image.fromarray(np.stack([5 * x, 9 * y, 100 + 2 * x], axis=-1).astype(np.uint8))
    gray = np.asarray(rgb.convert("L"), dtype=np.float32)
    deep = {"I;16": (gray * 257).astype(np.uint16), "I": (gray * 1000 - 9).astype(np.int32), "F": gray / 255,
            "F wide": gray * 20 - 3, "I small": gray.astype(np.int32)}  # fmt: skip
    images = {mode: (rgb.convert(mode), "TIFF", {}) for mode in ("L", "1", "P", "PA", "LA", "RGB", "RGBA", "CMYK")}
    images |= {mode: (PIL.Image.fromarray(values), "TIFF", {}) for mode, values in deep.items()}
    images["P with transparency"] = (rgb.convert("P"), "PNG", {"transparency": 3})
    for orientation in range(1, 9):
        exif = PIL.Image.Exif()
        exif[0x0112] = orientation
        images[f"EXIF {orientation}"] = (rgb, "PNG", {"exif": exif})
        # A text where a number belongs: it can be read, but not be written anew.
        exif[0x010F], exif[0x011A] = "maker", 72.0
        damaged = exif.tobytes().replace(b"\x01\x0f\x00\x02", b"\x01\x1a\x00\x02")
        images[f"EXIF {orientation}, damaged"] = (rgb, "JPEG", {"exif": damaged})
    for number, exif in enumerate([b"Exif\0\0rubbish", b"Exif\0\0II*\0\x08\0\0\0\xff\xff\x12\x01", b"Exif\0\0"]):
        images[f"rubbish {number}"] = (rgb, "JPEG", {"exif": exif})
    files = {name: io.BytesIO() for name in images}
    for name, (image, kind, options) in images.items():
        image.save(files[name], kind, **options)
    return {name: file.getvalue() for name, file in files.items()}


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize("name", odd_pictures())
def test_the_served_copy_decodes_to_the_same_pixels(name):
    content = odd_pictures()[name]
    classifier = OnnxImageClassifier.__new__(OnnxImageClassifier)
    classifier.preprocessing = {
        "resize": None,
        "center_crop": None,
        "rescale_factor": 1,
        "mean": [0] * 3,
        "std": [1] * 3,
    }
    found = classifier.preprocess(PIL.Image.open(io.BytesIO(content)))
    np.testing.assert_array_equal(found.transpose(1, 2, 0), np.asarray(decoding.decode_image(content)))


def test_the_served_copy_of_the_decoding_is_a_copy():
    for name in ("check_size", "upright_rgb", "to_rgb", "_eight_bits"):
        assert inspect.getsource(getattr(onnx_serving, name)) == inspect.getsource(getattr(decoding, name)), name
    for name in ("FORMATS", "MAX_PIXELS", "ORIENTATION", "_UPRIGHT"):
        assert getattr(onnx_serving, name) == getattr(decoding, name), name


def test_a_picture_of_too_many_pixels_is_not_served():
    classifier = OnnxImageClassifier.__new__(OnnxImageClassifier)
    classifier.preprocessing = describe_preprocessing(ViTImageProcessor(**PROCESSORS["square"]), ["a"])
    with pytest.raises(PIL.Image.DecompressionBombError, match="20000 x 20000"):
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
    names = ["README.md", "model.onnx", "preprocessing.json", "serve.py"]
    assert sorted(path.name for path in (tmp_path / "served").iterdir()) == names
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
