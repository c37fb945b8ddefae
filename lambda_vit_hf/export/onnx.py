"""Export to ONNX for any batch size, 8-bit ONNX and `torch.export`; each compared with the model it came from."""

import logging
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn


TOLERANCE = 1e-3


@dataclass
class ExportCheck:
    """
    How an exported model compares with the PyTorch model, on the same images.

    Attributes:
        file: name of the file.
        file_bytes: its size.
        num_images: images both were run on.
        max_difference: largest difference between two logits.
        top1_agreement: share of the images that both give the same best class.
    """

    file: str
    file_bytes: int
    num_images: int
    max_difference: float
    top1_agreement: float

    def __str__(self) -> str:
        return (
            f"{self.file}: {self.file_bytes / 1e6:.1f} MB; on {self.num_images} images, largest difference of a logit"
            f" {self.max_difference:.2g}, same top-1 in {100 * self.top1_agreement:.1f} %"
        )


class LogitsOnly(nn.Module):
    """A classifier whose output is the tensor of logits `(batch, classes)`: what a file can hold."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        output = self.model(pixel_values)
        return output if isinstance(output, torch.Tensor) else output.logits


def export_onnx(model: nn.Module, path: str | Path, images: torch.Tensor | None = None) -> ExportCheck:
    """
    Write an ONNX file (input `pixel_values`, output `logits`, any batch size) and compare it with the model.

    Args:
        model ([`LambdaViTForImageClassification`] or any image classifier): in eval mode; float32 or float16.
        path (`str` or `Path`): the file; large weights stay inside it (ONNX allows 2 GB).
        images (`torch.Tensor` of shape `(images, channels, height, width)`, *optional*):
            What to compare on; by default three images of noise.

    Raises:
        ValueError: in training mode, in bfloat16 (numpy, and so onnxruntime's interface, has no such type), or if a
            logit differs by more than 1e-3 (relative to logits over 1; float16: 3e-2). The file is not left behind.
    """
    _check_exportable(model)
    if next(model.parameters()).dtype == torch.bfloat16:
        raise ValueError("An ONNX model in bfloat16 cannot be fed from numpy: export in float32 or float16.")
    images = images_for(model, images)
    _try(model, images)
    path = Path(path)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder, warnings.catch_warnings():
        # The exporter's own housekeeping, on every call: https://github.com/pytorch/pytorch/issues/146830
        warnings.simplefilter("ignore", (DeprecationWarning, FutureWarning))
        unchecked = Path(folder) / path.name
        torch.onnx.export(
            LogitsOnly(model).eval(),
            (_example(images),),
            unchecked,
            dynamo=True,
            verbose=False,
            external_data=False,
            input_names=["pixel_values"],
            output_names=["logits"],
            dynamic_shapes={"pixel_values": {0: torch.export.Dim("batch")}},
        )
        check = compare_onnx(model, unchecked, images)
        _check_tolerance(check, model)
        unchecked.replace(path)
    return check


def quantize_onnx(source: str | Path, path: str | Path) -> None:
    """
    Turn the linear layers of an ONNX file into 8-bit integers: weights per output channel, activations as they come.

    Weights use 7 of their 8 bits. CPUs with AVX2 or AVX-512 but without VNNI add pairs of products of an activation
    (0 to 255) and a weight in 16 bits: with weights up to 127 these sums would saturate in silence, with weights up
    to 64 they cannot, so that the file gives the same answers on every CPU. Source: onnxruntime's documentation of
    quantization, "When to use reduce-range".

    Activations get one scale for the whole batch: run images one by one, or an image's logits depend on the others.

    Nothing needs calibration. Accuracy has to be looked at: compare with [`compare_onnx`] on real images.

    Args:
        source (`str` or `Path`): an ONNX file in float32.
        path (`str` or `Path`): the file to write, about a quarter of the size.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic

    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)  # it advises a preprocessing step that changes nothing in these graphs
    try:
        quantize_dynamic(
            str(source), str(path), op_types_to_quantize=["MatMul", "Gemm"], per_channel=True,
            reduce_range=True, weight_type=QuantType.QInt8, extra_options={"MatMulConstBOnly": True},
        )  # fmt: skip
    finally:
        root.setLevel(level)


def export_program(model: nn.Module, path: str | Path, images: torch.Tensor | None = None) -> ExportCheck:
    """
    Write a `torch.export` program (`.pt2`, any batch size) and compare it with the model. Read it with
    `torch.export.load(path).module()`.

    Args:
        model ([`LambdaViTForImageClassification`] or any image classifier): in eval mode.
        path (`str` or `Path`): the file.
        images (`torch.Tensor` of shape `(images, channels, height, width)`, *optional*): what to compare on.

    Raises:
        ValueError: in training mode, or if a logit differs by more than 1e-3 (16 bits: 3e-2).
    """
    _check_exportable(model)
    images = images_for(model, images)
    torch.export.save(exported_program(model, images), path)
    loaded = torch.export.load(path).module()
    check = _compare(model, lambda batch: loaded(batch), images, Path(path))
    _check_tolerance(check, model)
    return check


def exported_program(model: nn.Module, images: torch.Tensor) -> torch.export.ExportedProgram:
    """The model as a `torch.export` program from `pixel_values` to logits, for any batch size."""
    _try(model, images)
    shapes = {"pixel_values": {0: torch.export.Dim("batch")}}
    with torch.no_grad():
        return torch.export.export(LogitsOnly(model).eval(), (_example(images),), dynamic_shapes=shapes)


def compare_onnx(
    model: nn.Module, path: str | Path, images: torch.Tensor, num_threads: int = 0, batch_size: int = 32
) -> ExportCheck:
    """Logits of an ONNX file and of the model it came from, on `images` `(images, channels, height, width)`."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = num_threads or torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def run(batch: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(session.run(["logits"], {"pixel_values": batch.cpu().numpy()})[0])

    return _compare(model, run, images, Path(path), batch_size)


def _check_exportable(model: nn.Module) -> None:
    if model.training:
        raise ValueError("Export a model in eval mode: call `model.eval()` first.")
    if getattr(model, "newly_initialized_head", False):
        raise ValueError("The class head of this model is new: its logits would be random. Train it, then export.")


def _try(model: nn.Module, images: torch.Tensor) -> None:
    """
    One plain call before the exporter's: images that do not fit are refused in plain words, and layers note a lambda
    that was changed in its buffer, which the exporter cannot read.
    """
    with torch.no_grad():
        model(_example(images))


def images_for(model: nn.Module, images: torch.Tensor | None) -> torch.Tensor:
    """The images to compare on, where the model is and in its dtype; by default three of noise."""
    parameter = next(model.parameters())
    if images is None:
        size = model.config.image_size
        height, width = size if isinstance(size, (list, tuple)) else (size, size)
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(3, model.config.num_channels, height, width, generator=generator)
    if not len(images):
        raise ValueError("There is no image to compare the exported model on: give at least one.")
    return images.to(parameter.device, parameter.dtype)


def _example(images: torch.Tensor) -> torch.Tensor:
    # Two images: with one, the batch size would be taken for a constant.
    return images[:1].repeat(2, 1, 1, 1)


@torch.inference_mode()
def _compare(model: nn.Module, run, images: torch.Tensor, path: Path, batch_size: int = 32) -> ExportCheck:
    rest = images[1:].split(batch_size) if len(images) > 1 else ()
    batches = [images[:1], *rest]  # batch sizes that were not traced
    expected = torch.cat([LogitsOnly(model)(batch).float().cpu() for batch in batches])
    found = torch.cat([run(batch).float().cpu() for batch in batches])
    agreement = (expected.argmax(dim=1) == found.argmax(dim=1)).double().mean().item()
    difference = (expected - found).abs().max().item()
    return ExportCheck(path.name, path.stat().st_size, len(images), difference, agreement)


def _check_tolerance(check: ExportCheck, model: nn.Module) -> None:
    tolerance = TOLERANCE if next(model.parameters()).dtype in (torch.float32, torch.float64) else 30 * TOLERANCE
    if not np.isfinite(check.max_difference) or check.max_difference > tolerance:
        raise ValueError(f"The exported model is another function (tolerance {tolerance}). {check}.")
