"""Which int8 keeps accuracy and is fast on this CPU: activations scaled as they come, or by images seen before?

    python -m benchmarks.quantization outputs/mine --dataset_dir DIR --output outputs/quantization.json
    python -m benchmarks.quantization outputs/mine --dataset_dir DIR --by_layer --num_images 200
    python -m benchmarks.quantization --show results/quantization_dinov2_small.json

`dynamic` is what `lambda-vit export --int8` writes; `static` quantises the same layers (QDQ), activations scaled by
their least and largest value on training images (`--int8_scales static`), or by a percentile. Images lost (right in
float32, wrong in int8) and won tell a loss from chance. OpenVINO, where it is installed, runs the former of these and
a file made by NNCF (pip install nncf), beside float32. Top-1 is on validation images, speed in turns on noise.
`--by_layer`: what each linear layer changes where it alone is int8.
"""

import argparse
import json
import statistics
import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from onnxruntime.quantization import CalibrationMethod
from torch import nn
from tqdm.auto import tqdm

from lambda_vit_hf.cli.images import add_dataset_options, dataset_options
from lambda_vit_hf.cli.runner import run_program
from lambda_vit_hf.evaluation.classifier import load_classifier
from lambda_vit_hf.evaluation.evaluate import labelled_images
from lambda_vit_hf.evaluation.throughput import (
    describe_environment,
    environment_line,
    interleave,
    markdown_table,
    speedup,
)
from lambda_vit_hf.export.onnx import export_onnx
from lambda_vit_hf.export.openvino_ir import openvino_core, run_openvino
from lambda_vit_hf.export.precision import linear_nodes, quantize_by_images, quantize_onnx
from lambda_vit_hf.export.variants import run_session
from lambda_vit_hf.models.families import AutoLambdaModelForImageClassification


def quantize_by_percentile(source: Path, path: Path, images: torch.Tensor) -> None:
    """As [`quantize_onnx`] with calibration images, but scales leave out the most extreme 0.01 % of the values."""
    method = CalibrationMethod.Percentile
    quantize_by_images(source, path, images, calibrate_method=method, extra_options={"CalibPercentile": 99.99})


STATIC = "static, least and largest"
METHODS = {STATIC: quantize_onnx, "static, 99.99 %": quantize_by_percentile}


def quantize_by_nncf(source: Path, path: Path, images: torch.Tensor) -> None:
    """OpenVINO's file with 8-bit linear layers, by NNCF (pip install nncf) as for transformers."""
    import nncf
    import openvino

    model = nncf.quantize(
        openvino.convert_model(str(source)),
        nncf.Dataset(list(images.numpy()), lambda image: image[None]),
        model_type=nncf.ModelType.TRANSFORMER,
        subset_size=len(images),
    )
    openvino.save_model(model, str(path), compress_to_fp16=False)


def write_files(
    model, calibration: torch.Tensor, folder: Path, only_dynamic: bool = False
) -> dict[tuple[str, str], tuple[Path, Callable]]:
    """Of each engine and way, the file and a function that runs it; without OpenVINO and NNCF, what there is."""
    exact, found = folder / "model.onnx", {}
    export_onnx(model, exact, calibration[:3])
    quantize_onnx(exact, folder / "dynamic.onnx")
    files = {"fp32": exact, "dynamic": folder / "dynamic.onnx"}
    if only_dynamic:
        return {("onnxruntime", name): (path, run_session(path)) for name, path in files.items()}
    for index, (method, quantize) in enumerate(METHODS.items()):
        files[method] = folder / f"{index}.onnx"
        quantize(exact, files[method], calibration)
    for name, path in files.items():
        found["onnxruntime", name] = path, run_session(path)
    if find_spec("openvino"):
        core = openvino_core()
        files = {"fp32": exact, STATIC: files[STATIC]}
        if find_spec("nncf"):
            files["static, by NNCF"] = folder / "nncf.xml"
            quantize_by_nncf(exact, folder / "nncf.xml", calibration)
        for name, path in files.items():
            found["OpenVINO", name] = path, run_openvino(core, path, "fp32")
    return found


def load_model_and_images(
    model_name: str, num_images: int, num_calibration_images: int, **dataset
) -> tuple[nn.Module, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The model as it is exported, images to be measured on and their labels, and training images for scales."""
    model = load_classifier(model_name, model_class=AutoLambdaModelForImageClassification).prepare_for_inference()
    images, labels = labelled_images(model_name, num_images=num_images, **dataset)
    calibration, _ = labelled_images(model_name, num_images=num_calibration_images, **{**dataset, "split": "train"})
    return model, images, labels, calibration


def measure(
    model_name: str, num_images: int, num_calibration_images: int, batch_size: int, only_dynamic: bool, **dataset
) -> dict:
    """Accuracy, file size and speed of each way, and of float32 in the same engine."""
    model, images, labels, calibration = load_model_and_images(
        model_name, num_images, num_calibration_images, **dataset
    )
    with tempfile.TemporaryDirectory() as folder:
        found = write_files(model, calibration, Path(folder), only_dynamic)
        logits = {key: torch.cat([run(batch) for batch in images.split(50)]) for key, (_, run) in found.items()}
        noise = torch.randn(batch_size, *images.shape[1:], generator=torch.Generator().manual_seed(0))
        timed = {" ".join(key): lambda run=run: run(noise) for key, (_, run) in found.items()}
        seconds = dict(zip(found, interleave(timed, 15, warm_up=1).values(), strict=True))
        sizes = {
            key: sum(part.stat().st_size for part in {path, path.with_suffix(".bin")} if part.exists())
            for key, (path, _) in found.items()
        }
    answers = {key: values.argmax(dim=1) for key, values in logits.items()}
    is_right = {key: answer == labels for key, answer in answers.items()}
    rows = [
        {
            "engine": engine,
            "int8": name,
            "top1": is_right[engine, name].double().mean().item(),
            "lost": (is_right[engine, "fp32"] & ~is_right[engine, name]).sum().item(),
            "won": (is_right[engine, name] & ~is_right[engine, "fp32"]).sum().item(),
            "agreement": (answers[engine, name] == answers[engine, "fp32"]).double().mean().item(),
            "images_per_second": batch_size / statistics.median(seconds[engine, name]),
            "speedup": speedup(seconds[engine, "fp32"], seconds[engine, name]),
            "file_bytes": sizes[engine, name],
        }
        for engine, name in found
    ]
    environment = {**describe_environment(), "batch": batch_size, "images": num_images}
    return {"rows": rows, "environment": environment}


def measure_by_layer(model_name: str, num_images: int, num_calibration_images: int, **dataset) -> dict:
    """KL divergence (nats) of the class probabilities from float32's, with one linear layer in int8, and with all."""
    model, images, _, calibration = load_model_and_images(model_name, num_images, num_calibration_images, **dataset)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        exact, path = Path(folder) / "model.onnx", Path(folder) / "int8.onnx"
        export_onnx(model, exact, calibration[:3])
        nodes = linear_nodes(exact)
        expected = run_session(exact)(images).log_softmax(dim=1)
        for layer in tqdm([*nodes, None], desc="linear layers"):
            kept = [name for name in nodes if layer is not None and name != layer]
            row = {"layer": "all" if layer is None else layer_name(model, nodes[layer])}
            for way, given in {"dynamic": None, STATIC: calibration}.items():
                quantize_onnx(exact, path, given, kept_in_float=kept)
                found = run_session(path)(images).log_softmax(dim=1)
                row[way] = (expected.exp() * (expected - found)).sum(dim=1).mean().item()
            rows.append(row)
    return {"by_layer": rows, "environment": {**describe_environment(), "images": num_images}}


def layer_name(model: nn.Module, weights: np.ndarray) -> str:
    """Which linear layer of a model has these weights, turned or not; of a part of a layer also which outputs."""
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        outputs = [row.tobytes() for row in module.weight.detach().numpy()]
        for turned in (np.ascontiguousarray(weights.T), weights):
            if turned[0].tobytes() in outputs:
                start = outputs.index(turned[0].tobytes())
                part = "" if len(turned) == len(outputs) else f", outputs {start} to {start + len(turned) - 1}"
                return name + part
    raise ValueError(f"No layer of the model has these weights of shape {weights.shape}.")


def print_layers(figures: dict) -> None:
    rows = sorted(figures["by_layer"], key=lambda row: -row[STATIC])
    cells = [(row["layer"], f"{row['dynamic']:.2g}", f"{row[STATIC]:.2g}") for row in rows]
    header = ("in int8", "KL (nats), dynamic", f"KL (nats), {STATIC}")
    print(f"\n{markdown_table(header, cells)}\n\n{environment_line(figures['environment'])}")


def print_table(figures: dict) -> None:
    if "by_layer" in figures:
        print_layers(figures)
        return
    header = ("engine", "int8", "top-1 (%)", "images lost, won", "same class as fp32 (%)", "images/s", "x fp32 there",
              "file (MB)")  # fmt: skip
    rows = [
        (row.get("engine", "onnxruntime"), row["int8"], f"{100 * row['top1']:.2f}",
         f"{row['lost']}, {row['won']}" if "lost" in row else "", f"{100 * row['agreement']:.2f}",
         f"{row['images_per_second']:.1f}", f"{row['speedup']:.2f}", f"{row['file_bytes'] / 1e6:.1f}")
        for row in figures["rows"]
    ]  # fmt: skip
    print(f"\n{markdown_table(header, rows)}\n\n{environment_line(figures['environment'])}")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.quantization", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("model", nargs="?")
    add("--num_images", type=int, default=2000)
    add("--num_calibration_images", type=int, default=128)
    add("--batch_size", type=int, default=8)
    add("--output", type=Path, default=Path("outputs/quantization.json"))
    ways = parser.add_mutually_exclusive_group()
    ways.add_argument(
        "--only_dynamic", action="store_true", help="the export's default and float32 in onnxruntime, nothing else"
    )
    ways.add_argument(
        "--by_layer", action="store_true", help="one linear layer at a time, instead of ways and engines"
    )
    add("--show", type=Path, help="only print the table of figures written before")
    add_dataset_options(parser)
    arguments = parser.parse_args(argv)
    if arguments.show is None:
        if arguments.model is None:
            parser.error("name a model")
        if arguments.by_layer:
            figures = measure_by_layer(arguments.model, arguments.num_images, arguments.num_calibration_images,
                                       **dataset_options(arguments))  # fmt: skip
        else:
            figures = measure(arguments.model, arguments.num_images, arguments.num_calibration_images,
                              arguments.batch_size, arguments.only_dynamic, **dataset_options(arguments))  # fmt: skip
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    else:
        figures = json.loads(arguments.show.read_text(encoding="utf-8"))
    print_table(figures)


if __name__ == "__main__":
    run_program("benchmark", main)
