"""A folder that onnxruntime alone can serve: the model, what happens to a picture first, and the code for both."""

import json
import shutil
import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import torch
from torch import nn

from ..data import decoding
from ..models import checksums
from ..models.checksums import write_checksums
from .onnx import ExportCheck, compare_onnx, export_onnx, images_for, quantize_onnx


LEAST_AGREEMENT = 0.9


def describe_preprocessing(image_processor, labels: Sequence[str]) -> dict:
    """
    What happens to a picture before the model, for a reader without transformers (see `onnx_serving.py`).

    Args:
        image_processor: a Hugging Face image processor that resizes, crops, rescales and normalizes, or some of it.
        labels (`Sequence[str]`): class names, in the order of the logits.

    Raises:
        ValueError: if the processor does something that cannot be described here.
    """
    settings = image_processor.to_dict()
    size, crop = settings.get("size") or {}, settings.get("crop_size") or {}
    size = {name: value for name, value in dict(size).items() if value is not None}
    if settings.get("do_pad") or (
        settings.get("do_resize") and set(size) not in ({"height", "width"}, {"shortest_edge"})
    ):
        raise ValueError(f"Cannot describe an image processor that pads, or resizes to {size}.")
    normalize = settings.get("do_normalize")
    return {
        "color": "RGB",
        "resize": size if settings.get("do_resize") else None,
        "resample": _RESAMPLING[int(image_processor.resample)],
        "center_crop": {name: crop[name] for name in ("height", "width")} if settings.get("do_center_crop") else None,
        "rescale_factor": settings["rescale_factor"] if settings.get("do_rescale") else 1.0,
        "mean": list(settings["image_mean"]) if normalize else [0.0] * 3,
        "std": list(settings["image_std"]) if normalize else [1.0] * 3,
        "input": "pixel_values: float32 (batch, 3, height, width)",
        "output": "logits: float32 (batch, classes)",
        "labels": list(labels),
    }


_RESAMPLING = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}


def export_for_serving(
    model: nn.Module,
    image_processor,
    folder: str | Path,
    images: torch.Tensor | None = None,
    int8: bool = False,
) -> ExportCheck:
    """
    Write a folder that onnxruntime, numpy and Pillow can serve: `model.onnx`, `preprocessing.json`, `serve.py`,
    `decoding.py`, `checksums.py`, a README, and `SHA256SUMS` of all.

    Args:
        model ([`LambdaViTForImageClassification`] or any image classifier): in eval mode, float32.
        image_processor: the model's Hugging Face image processor.
        folder (`str` or `Path`): created; must not exist, or be empty.
        images (`torch.Tensor` of shape `(images, channels, height, width)`, *optional*):
            Processed real images to compare on; by default three images of noise.
        int8 (`bool`, *optional*, defaults to `False`): 8-bit linear layers (see [`quantize_onnx`]).

    Returns:
        [`ExportCheck`]: of the file in the folder against the PyTorch model.

    Raises:
        FileExistsError: if the folder is not empty.
        ValueError: if the model does not take float32 RGB images, on a difference in logits, and with `int8`, if fewer
            than 90 % of given `images` keep their best class.
    """
    folder = Path(folder)
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise FileExistsError(f"{folder} exists and is not an empty folder. Name another one.")
    if model.config.num_channels != 3 or next(model.parameters()).dtype != torch.float32:
        raise ValueError("A folder to serve holds a float32 model for RGB images.")
    labels = [model.config.id2label[index] for index in range(model.config.num_labels)]
    preprocessing = describe_preprocessing(image_processor, labels)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        exact = Path(scratch) / "model.onnx"
        check = export_onnx(model, exact, images)
        if int8:
            quantized = Path(scratch) / "int8.onnx"
            quantize_onnx(exact, quantized)
            check = compare_onnx(model, quantized, images_for(model, images), batch_size=1)  # as it is served
            if images is not None and check.top1_agreement < LEAST_AGREEMENT:
                raise ValueError(f"8 bits are too few for this model. {check}. Export it without int8.")
            exact = quantized
        shutil.copyfile(exact, folder / "model.onnx")
    check.file = "model.onnx"
    _copy_code(folder)
    _write_json(folder / "preprocessing.json", {**preprocessing, "one_image_at_a_time": int8})
    (folder / "README.md").write_text(_readme(check, int8), encoding="utf-8")
    write_checksums(folder)
    return check


def _copy_code(folder: Path) -> None:
    """The code that serves, and beside it this package's own decoding of pictures and check of files."""
    serving = Path(__file__).with_name("onnx_serving.py").read_text(encoding="utf-8")
    for module in (decoding, checksums):
        path = Path(module.__file__)
        shutil.copyfile(path, folder / path.name)
        package = module.__package__.removeprefix("lambda_vit_hf")
        serving = serving.replace(f"from .{package}.{path.stem} import", f"from {path.stem} import")
    (folder / "serve.py").write_text(serving, encoding="utf-8")


def _readme(check: ExportCheck, int8: bool) -> str:
    kind = "8-bit linear layers" if int8 else "float32"
    return (
        f"# An image classifier for onnxruntime ({kind})\n\n"
        "```bash\npip install onnxruntime numpy pillow\npython serve.py picture.jpg\n```\n\n"
        "```python\nimport PIL.Image\nfrom serve import OnnxImageClassifier\n\n"
        'print(OnnxImageClassifier(".").classify([PIL.Image.open("picture.jpg")]))\n```\n\n'
        "`preprocessing.json` says what happens to a picture before the model, and what the classes are called.\n\n"
        f"{_ONE_BY_ONE if int8 else ''}"
        f"Compared with the PyTorch model it was exported from: {check}.\n\n"
        f"Exported with torch {version('torch')} and onnx {version('onnx')} by lambda-vit-hf.\n"
    )


_ONE_BY_ONE = (
    "Images run one by one: onnxruntime scales the activations of a whole batch by one number, so in a batch the"
    " scores of an image would depend on the others.\n\n"
)


def _write_json(path: Path, values: dict) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
