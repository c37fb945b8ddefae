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
        _drop_stack_traces(unchecked)
        check = compare_onnx(model, unchecked, images)
        _check_tolerance(check, model)
        unchecked.replace(path)
    return check


def _drop_stack_traces(path: Path) -> None:
    """The exporter writes into each node which lines of which files of this machine it came from."""
    import onnx

    model = onnx.load(path)
    graph = model.graph
    for part in (graph, *graph.node, *graph.input, *graph.output, *graph.initializer, *graph.value_info):
        part.ClearField("metadata_props")
    onnx.save(model, path)


def quantize_onnx(source: str | Path, path: str | Path) -> None:
    """
    Turn the linear layers of an ONNX file into 8-bit integers: weights per output channel, activations as they come.

    Weights use 7 of their 8 bits. CPUs with AVX2 or AVX-512 but without VNNI add pairs of products of an activation
    (0 to 255) and a weight in 16 bits: with weights up to 127 these sums would saturate in silence, with weights up
    to 64 they cannot, so that the file gives the same answers on every CPU. Source: onnxruntime's documentation of
    quantization, "When to use reduce-range".

    onnxruntime gives the activations of a batch one scale, and an image's logits would depend on the others: so the
    graph takes the images of a batch one by one (ONNX operator Scan).

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
    _take_images_one_by_one(path)


def _take_images_one_by_one(path: str | Path) -> None:
    """Put the graph of a file, from `pixel_values` to `logits`, into a Scan over the images of the batch."""
    import onnx
    from onnx import helper

    model = onnx.load(path)
    (pixel_values,), (logits,) = model.graph.input, model.graph.output
    body = onnx.GraphProto()
    body.CopyFrom(model.graph)
    for field in ("input", "output", "value_info"):  # shapes of whole batches
        body.ClearField(field)
    for node in body.node:  # a name of the outer graph may not come back in the inner one
        for names in (node.input, node.output):
            for index, name in enumerate(names):
                if name in (pixel_values.name, logits.name):
                    names[index] = f"{name}_of_one"
    for value, name, values in ((pixel_values, "image", body.input), (logits, "scores", body.output)):
        sizes = [dim.dim_value for dim in value.type.tensor_type.shape.dim[1:]]
        values.append(helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, sizes))
    body.initializer.append(helper.make_tensor("batch_axis", onnx.TensorProto.INT64, [1], [0]))
    body.node.insert(0, helper.make_node("Unsqueeze", ["image", "batch_axis"], [f"{pixel_values.name}_of_one"]))
    body.node.append(helper.make_node("Squeeze", [f"{logits.name}_of_one", "batch_axis"], ["scores"]))
    scan = helper.make_node("Scan", [pixel_values.name], [logits.name], num_scan_inputs=1, body=body)
    model.graph.CopyFrom(helper.make_graph([scan], model.graph.name, [pixel_values], [logits]))
    onnx.save(model, path)


def halve_onnx(source: str | Path, path: str | Path) -> None:
    """
    Turn an ONNX file in float32 into one in float16 that still takes and gives float32, as transformers.js feeds it.

    Args:
        source (`str` or `Path`): an ONNX file in float32.
        path (`str` or `Path`): the file to write, about half of the size.
    """
    import onnx
    from onnxruntime.transformers.float16 import DEFAULT_OP_BLOCK_LIST, convert_float_to_float16

    least, largest = np.finfo(np.float16).smallest_subnormal, np.finfo(np.float16).max
    # Token merging adds with ScatterElements, which onnxruntime's CPU kernels do not do in float16.
    halved = convert_float_to_float16(
        onnx.load(source), keep_io_types=True, min_positive_val=float(least), max_finite_val=float(largest),
        op_block_list=[*DEFAULT_OP_BLOCK_LIST, "ScatterElements"],
    )  # fmt: skip
    onnx.save(halved, path)


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
