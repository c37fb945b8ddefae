"""ONNX files in fewer bits: linear layers in 8-bit integers, or everything in float16."""

import logging
from collections.abc import Collection, Iterator
from pathlib import Path

import numpy as np
import torch


def quantize_onnx(
    source: str | Path,
    path: str | Path,
    calibration: torch.Tensor | None = None,
    kept_in_float: Collection[str] = (),
) -> None:
    """
    Turn the linear layers of an ONNX file into 8-bit integers: weights per output channel; activations as they come
    (dynamic), or, with calibration images, by the least and largest value that each had on these (static). Products
    of attention, norms and what a layer gives stay in float.

    Weights use 7 of their 8 bits. CPUs with AVX2 or AVX-512 but without VNNI add pairs of products of an activation
    (0 to 255) and a weight in 16 bits: with weights up to 127 these sums would saturate in silence, with weights up
    to 64 they cannot, so that the file gives the same answers on every CPU. Source: onnxruntime's documentation of
    quantization, "When to use reduce-range".

    As activations come, onnxruntime gives those of a batch one scale, and an image's logits would depend on the
    others: so the graph takes the images of a batch one by one (ONNX operator Scan). Fixed scales need no such thing.

    Accuracy has to be looked at: compare with [`compare_onnx`] on real images.

    Args:
        source (`str` or `Path`): an ONNX file in float32.
        path (`str` or `Path`): the file to write, about a quarter of the size.
        calibration (`torch.Tensor` of shape `(images, channels, height, width)`, *optional*): processed training
            images, a hundred or so, in float32.
        kept_in_float (`Collection[str]`, *optional*): linear layers to leave as they are, by [`linear_nodes`].

    Raises:
        ValueError: if there is no calibration image, or no such layer.
    """
    from onnxruntime.quantization import quantize_dynamic

    if calibration is not None and not len(calibration):
        raise ValueError("There is no image to take the scales of int8 from: give at least one.")
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)  # it advises a preprocessing step that changes nothing in these graphs
    try:
        if calibration is None:
            quantize_dynamic(str(source), str(path), **_linear_layers(source, kept_in_float))
        else:
            quantize_by_images(source, path, calibration, kept_in_float)
    finally:
        root.setLevel(level)
    if calibration is None:
        _take_images_one_by_one(path)


def quantize_by_images(
    source: str | Path, path: str | Path, calibration: torch.Tensor, kept_in_float: Collection[str] = (), **options
) -> None:
    """The static int8 of [`quantize_onnx`]; `options` go to onnxruntime's `quantize_static`."""
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static

    layers = _linear_layers(source, kept_in_float)
    layers["extra_options"] |= options.pop("extra_options", {})
    options |= {"quant_format": QuantFormat.QDQ, "activation_type": QuantType.QUInt8}
    quantize_static(str(source), str(path), CalibrationImages(calibration), **layers, **options)


LINEAR = ("MatMul", "Gemm")


def linear_nodes(source: str | Path) -> dict[str, np.ndarray]:
    """Weights `(inputs, outputs)`, of a Gemm turned, of an ONNX file's linear layers by the names of their nodes."""
    from onnx import numpy_helper

    return {name: numpy_helper.to_array(one) for name, one in _products(source).items() if one is not None}


def _products(source: str | Path) -> dict:
    """Weights, as ONNX has them, by node; `None` where both factors are activations."""
    import onnx

    graph = onnx.load(source).graph
    weights = {one.name: one for one in graph.initializer}
    return {node.name: weights.get(node.input[1]) for node in graph.node if node.op_type in LINEAR}


def _linear_layers(source: str | Path, kept_in_float: Collection[str]) -> dict:
    """
    onnxruntime's options for the linear layers of a file and nothing else. Static scales ignore `MatMulConstBOnly`,
    so the products of attention are named. What a layer gives stays in float: to round it costs accuracy and time.
    """
    from onnxruntime.quantization import QuantType

    products = _products(source)
    linear = [name for name, weights in products.items() if weights is not None]
    if unknown := sorted(set(kept_in_float) - set(linear)):
        raise ValueError(f"No linear layers of this file: {', '.join(unknown)}. It has {', '.join(linear)}.")
    exact = [name for name, weights in products.items() if weights is None or name in kept_in_float]
    exact += [f"{name}_MatMul" for name in exact]  # what onnxruntime makes of a Gemm before it looks
    return {
        "op_types_to_quantize": LINEAR, "nodes_to_exclude": exact, "per_channel": True, "reduce_range": True,
        "weight_type": QuantType.QInt8,
        "extra_options": {"MatMulConstBOnly": True, "OpTypesToExcludeOutputQuantization": LINEAR},
    }  # fmt: skip


class CalibrationImages:
    """Batches of images, as onnxruntime's quantisation asks for them."""

    def __init__(self, images: torch.Tensor, batch_size: int = 16):
        self.batches: Iterator[torch.Tensor] = iter(images.split(batch_size))

    def get_next(self) -> dict[str, np.ndarray] | None:
        """The next batch by the name of the graph's input; `None` at the end."""
        batch = next(self.batches, None)
        return None if batch is None else {"pixel_values": batch.cpu().numpy()}


def _take_images_one_by_one(path: str | Path) -> None:
    """Put the graph of a file, from `pixel_values` to its outputs, into a Scan over the images of the batch."""
    import onnx
    from onnx import helper

    model = onnx.load(path)
    (pixel_values,), outputs = model.graph.input, model.graph.output
    body = onnx.GraphProto()
    body.CopyFrom(model.graph)
    for field in ("input", "output", "value_info"):  # shapes of whole batches
        body.ClearField(field)
    outer = {value.name for value in (pixel_values, *outputs)}
    for node in body.node:  # a name of the outer graph may not come back in the inner one
        for names in (node.input, node.output):
            for index, name in enumerate(names):
                if name in outer:
                    names[index] = f"{name}_of_one"
    of_image = {}
    for value in (pixel_values, *outputs):
        sizes = [dim.dim_value for dim in value.type.tensor_type.shape.dim[1:]]
        name = f"{value.name}_of_image"
        of_image[value.name] = helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, sizes)
    body.input.append(of_image.pop(pixel_values.name))
    body.output.extend(of_image.values())
    body.initializer.append(helper.make_tensor("batch_axis", onnx.TensorProto.INT64, [1], [0]))
    one = f"{pixel_values.name}_of_one"
    body.node.insert(0, helper.make_node("Unsqueeze", [body.input[0].name, "batch_axis"], [one]))
    for name, value in of_image.items():
        body.node.append(helper.make_node("Squeeze", [f"{name}_of_one", "batch_axis"], [value.name]))
    scan = helper.make_node("Scan", [pixel_values.name], list(of_image), num_scan_inputs=1, body=body)
    model.graph.CopyFrom(helper.make_graph([scan], model.graph.name, [pixel_values], outputs))
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
