"""OpenVINO: an ONNX file run by it, and written in its own format (IR)."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from .onnx import ExportCheck, check_tolerance, compare_outputs, images_for


def export_openvino(
    model: nn.Module, source: str | Path, path: str | Path, images: torch.Tensor | None = None
) -> ExportCheck:
    """
    Write OpenVINO's file (weights in float32 beside it, in `.bin`) and compare what it computes with the model.

    Args:
        model ([`LambdaViTForImageClassification`], any image classifier or encoder): in eval mode, float32.
        source (`str` or `Path`): its ONNX file, as [`export_onnx`] writes it.
        path (`str` or `Path`): the file to write, `.xml`.
        images (`torch.Tensor` of shape `(images, channels, height, width)`, *optional*):
            What to compare on; by default three images of noise.

    Raises:
        ImportError: without OpenVINO (the extra `openvino`).
        ValueError: if a logit or feature differs by more than 1e-3.
    """
    import openvino

    path = Path(path)
    openvino.save_model(openvino.convert_model(str(source)), str(path), compress_to_fp16=False)
    check = compare_outputs(model, _compiled(openvino_core(), path), images_for(model, images), path)
    check.file_bytes += path.with_suffix(".bin").stat().st_size
    check_tolerance(check, model)
    return check


def openvino_core(precision: str = "fp32"):
    """
    Raises:
        ValueError: if this CPU does not compute in bf16.
    """
    import openvino

    core = openvino.Core()
    if precision == "bf16" and "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        raise ValueError("OpenVINO does not compute in bf16 on this CPU: leave `bf16` out.")
    return core


def run_openvino(core, path: Path, precision: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """A function from pixel values to the first output of an ONNX or IR file, in OpenVINO on the CPU."""
    run = _compiled(core, path, precision)
    return lambda pixel_values: run(pixel_values)[0]


def _compiled(core, path: Path, precision: str = "fp32") -> Callable[[torch.Tensor], list[torch.Tensor]]:
    options = {
        "INFERENCE_PRECISION_HINT": {"fp32": "f32", "bf16": "bf16"}[precision],
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
    }
    compiled = core.compile_model(str(path), "CPU", options)

    def run(pixel_values: torch.Tensor) -> list[torch.Tensor]:
        return [torch.from_numpy(one.copy()) for one in compiled([pixel_values.cpu().numpy()]).values()]

    return run
