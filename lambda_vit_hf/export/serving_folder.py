"""A folder in the Hub's layout of ONNX models: for transformers.js, optimum, OpenVINO and onnxruntime alone."""

import functools
import json
import shutil
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from torch import nn

from ..data import decoding
from ..hub.exported_folder import MODEL_CONFIG
from ..models import checksums
from ..models.checksums import write_checksums
from ..models.problem_type import problem_type_of
from .onnx import ExportCheck, compare_onnx, export_onnx, images_for
from .openvino_ir import export_openvino
from .precision import halve_onnx, quantize_onnx
from .preprocessing import describe_preprocessing, processed_size


LEAST_AGREEMENT = 0.9
NO_SOFTMAX = (
    "Its logits are no scores of one of several classes: transformers.js's pipeline takes their softmax nevertheless,"
    " serve.py and transformers do not."
)
CLASSIFICATION = "image-classification"


def export_for_serving(
    model: nn.Module,
    image_processor,
    folder: str | Path,
    images: torch.Tensor | None = None,
    int8: bool = False,
    fp16: bool = False,
    openvino: bool = False,
    calibration: torch.Tensor | None = None,
) -> list[ExportCheck]:
    """
    Write a folder in the layout of https://huggingface.co/docs/transformers.js: `config.json` (`model_type: vit`, for
    any family: a runner of the graph needs to know no more), `lambda_config.json` (the model's own),
    `preprocessor_config.json`, `onnx/model.onnx`, and on request `onnx/model_fp16.onnx`, `onnx/model_quantized.onnx`
    and `openvino/openvino_model.xml` with its `.bin`. Beside them, for a classifier, `serve.py`, which needs
    onnxruntime, numpy and Pillow only, with `decoding.py` and `checksums.py`; a README; and `SHA256SUMS` of all. The
    folder appears at once, whole.

    Args:
        model ([`LambdaViTForImageClassification`], any image classifier or encoder): in eval mode, float32.
        image_processor: the model's Hugging Face image processor.
        folder (`str` or `Path`): created; must not exist, or be empty.
        images (`torch.Tensor` of shape `(images, channels, height, width)`, *optional*):
            Processed real images to compare on; by default three images of noise. Of their size are the images that
            the graph takes: that which the image processor makes.
        int8 (`bool`, *optional*, defaults to `False`): also with 8-bit linear layers (see [`quantize_onnx`]).
        fp16 (`bool`, *optional*, defaults to `False`): also in float16 (see [`halve_onnx`]).
        openvino (`bool`, *optional*, defaults to `False`): also for OpenVINO, in float32.
        calibration (`torch.Tensor` of shape `(images, channels, height, width)`, *optional*):
            Processed training images: int8 takes the scales of its activations from them, once for all. By default
            each image has its own.

    Returns:
        `list` of [`ExportCheck`]: of each graph in the folder against the PyTorch model.

    Raises:
        FileExistsError: if the folder is not empty.
        ImportError: without OpenVINO, where it is asked for.
        ValueError: if the model is neither classifier nor encoder, does not take float32 RGB images, or fades (lambda
            between 0 and 1); on an option of the image processor that transformers.js does not honour, which is named;
            if it makes images of another size than `images`, or than the model takes; on a difference in outputs; and
            in int8 or float16 on NaN, or if the `agreement` of [`ExportCheck`] on given `images` is below 0.9. Nothing
            is left behind.
    """
    folder = Path(folder)
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise FileExistsError(f"{folder} exists and is not an empty folder. Name another one.")
    if model.config.num_channels != 3 or next(model.parameters()).dtype != torch.float32:
        raise ValueError("A folder to serve holds a float32 model for RGB images.")
    diluting = {i: v for i, v in enumerate(getattr(model, "attention_lambdas", [])) if v is not None and 0 < v < 1}
    if diluting:
        raise ValueError(f"Layers have a lambda between 0 and 1: {diluting}. Train on, or remove their attention.")
    preprocessing = describe_preprocessing(image_processor)
    compared = images_for(model, images, image_processor)
    size, processed = tuple(compared.shape[-2:]), processed_size(image_processor, *compared.shape[-2:])
    if processed != size:
        raise ValueError(f"The image processor makes images of {processed} pixels, but `images` are of {size}.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as scratch:
        unfinished = Path(scratch) / folder.name
        (unfinished / "onnx").mkdir(parents=True)
        smaller = {"model_fp16.onnx": halve_onnx} if fp16 else {}
        if int8:
            smaller["model_quantized.onnx"] = functools.partial(quantize_onnx, calibration=calibration)
        checks = _write_graphs(model, unfinished / "onnx", compared, images is not None, smaller)
        if openvino:
            (unfinished / "openvino").mkdir()
            source, path = unfinished / "onnx" / "model.onnx", unfinished / "openvino" / "openvino_model.xml"
            checks.append(export_openvino(model, source, path, compared))
        config = describe_graph(model.config, int8, checks[0].task)
        config["image_size"] = size[0] if size[0] == size[1] else list(size)
        _write_json(unfinished / "config.json", config)
        (unfinished / MODEL_CONFIG).write_text(model.config.to_json_string(), encoding="utf-8")
        _write_json(unfinished / "preprocessor_config.json", preprocessing)
        if checks[0].task == CLASSIFICATION:
            _copy_code(unfinished)
        (unfinished / "README.md").write_text(_readme(checks), encoding="utf-8")
        write_checksums(unfinished)
        if folder.is_dir():
            folder.rmdir()
        unfinished.rename(folder)
    return checks


def describe_graph(config, int8: bool, task: str = CLASSIFICATION) -> dict:
    """
    The content of `config.json`: a plain ViT, which names the file with the model's own config.

    Args:
        config: of the model; see [`LambdaViTConfig`].
        int8 (`bool`): whether there is a file in int8, which transformers.js takes by default in a browser.
        task (`str`, *optional*, defaults to `"image-classification"`): or `"image-feature-extraction"`.
    """
    shape = ("image_size", "patch_size", "num_channels", "hidden_size", "num_hidden_layers", "num_attention_heads")
    is_classifier = task == CLASSIFICATION
    return {
        "model_type": "vit",
        "architectures": ["ViTForImageClassification" if is_classifier else "ViTModel"],
        **{name: getattr(config, name) for name in shape},
        **(
            {"id2label": config.id2label, "label2id": config.label2id, "problem_type": problem_type_of(config)}
            if is_classifier
            else {}
        ),
        "lambda_config": MODEL_CONFIG,
        **({} if int8 else {"transformers.js_config": {"dtype": "fp32"}}),
    }


def _write_graphs(
    model: nn.Module,
    folder: Path,
    images: torch.Tensor,
    are_real: bool,
    smaller: dict[str, Callable[[Path, Path], None]],
) -> list[ExportCheck]:
    exact = folder / "model.onnx"
    checks = [export_onnx(model, exact, images)]
    for name, write in smaller.items():
        write(exact, folder / name)
        check = compare_onnx(model, folder / name, images)
        is_close = not are_real or check.agreement >= LEAST_AGREEMENT
        if not (is_close and np.isfinite(check.max_difference)):
            bits = 8 if name == "model_quantized.onnx" else 16
            raise ValueError(f"{bits} bits are too few for this model. {check}. Export it without them.")
        checks.append(check)
    return checks


def _copy_code(folder: Path) -> None:
    """The code that serves, and beside it this package's own decoding of pictures and check of files."""
    serving = Path(__file__).with_name("onnx_serving.py").read_text(encoding="utf-8")
    for module in (decoding, checksums):
        path = Path(module.__file__)
        shutil.copyfile(path, folder / path.name)
        package = module.__package__.removeprefix("lambda_vit_hf")
        serving = serving.replace(f"from .{package}.{path.stem} import", f"from {path.stem} import")
    (folder / "serve.py").write_text(serving, encoding="utf-8")


_USE = {
    CLASSIFICATION: (
        "# An image classifier in ONNX\n\n"
        "With transformers.js, in a browser or Node (`dtype`: fp32; fp16 or q8 where the file is in `onnx/`):\n\n"
        "```js\nconst classify = await pipeline('image-classification', 'USER/NAME', { dtype: 'fp32' });\n"
        "await classify('picture.jpg');\n```\n\n"
        "With onnxruntime alone:\n\n"
        "```bash\npip install onnxruntime numpy pillow\npython serve.py picture.jpg\n```\n\n"
        "```python\nimport PIL.Image\nfrom serve import OnnxImageClassifier\n\n"
        'print(OnnxImageClassifier(".").classify([PIL.Image.open("picture.jpg")]))\n```\n\n'
    ),
    "image-feature-extraction": (
        "# An image encoder in ONNX\n\n"
        "With transformers.js, in a browser or Node (`dtype`: fp32; fp16 or q8 where the file is in `onnx/`):\n\n"
        "```js\nconst encode = await pipeline('image-feature-extraction', 'USER/NAME', { dtype: 'fp32' });\n"
        "const features = await encode('picture.jpg'); // last_hidden_state: 1 x tokens x hidden\n"
        "// await encode('picture.jpg', { pool: true }) is its pooler_output, where it has one\n```\n\n"
    ),
}


def _readme(checks: list[ExportCheck]) -> str:
    compared = "".join(f"- {check}\n" for check in checks)
    task, note = checks[0].task, "" if checks[0].has_softmax else f"{NO_SOFTMAX}\n\n"
    return (
        f"---\nlibrary_name: transformers.js\npipeline_tag: {task}\ntags:\n- onnx\n---\n\n{_USE[task]}{note}"
        "`config.json` says `vit` to whoever runs the graph; the config of the model that was exported is"
        f" `{MODEL_CONFIG}`.\n\n"
        f"Compared with the PyTorch model:\n\n{compared}\n"
        f"Exported with torch {version('torch')} and onnx {version('onnx')} by lambda-vit-hf.\n"
    )


def _write_json(path: Path, values: dict) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
