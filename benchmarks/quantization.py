"""Which int8 keeps accuracy and is fast on this CPU: activations scaled as they come, or by images seen before?

    python -m benchmarks.quantization outputs/mine --dataset_dir DIR --output outputs/quantization.json
    python -m benchmarks.quantization --show results/quantization_dinov2_small.json

`dynamic` is what `lambda-vit export --int8` writes; `static` quantises the same layers (QDQ), activations scaled by
their least and largest value on training images (`--int8_scales static`), or by a percentile. Top-1 is on validation
images, speed in turns on noise.
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path

import torch
from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static

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
from lambda_vit_hf.export.precision import CalibrationImages, quantize_onnx
from lambda_vit_hf.export.variants import run_session
from lambda_vit_hf.models.families import AutoLambdaModelForImageClassification


def quantize_by_percentile(source: Path, path: Path, images: torch.Tensor) -> None:
    """As [`quantize_onnx`] with calibration images, but scales leave out the most extreme 0.01 % of the values."""
    quantize_static(
        str(source), str(path), CalibrationImages(images), quant_format=QuantFormat.QDQ,
        op_types_to_quantize=["MatMul", "Gemm"], per_channel=True, reduce_range=True,
        activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
        calibrate_method=CalibrationMethod.Percentile,
        extra_options={"MatMulConstBOnly": True, "CalibPercentile": 99.99},
    )  # fmt: skip


METHODS = {"static, least and largest": quantize_onnx, "static, 99.99 %": quantize_by_percentile}


def measure(model_name: str, num_images: int, num_calibration_images: int, batch_size: int, **dataset) -> dict:
    """Accuracy, file size and speed of each way, and of float32."""
    model = load_classifier(model_name, model_class=AutoLambdaModelForImageClassification).prepare_for_inference()
    images, labels = labelled_images(model_name, num_images=num_images, **dataset)
    calibration, _ = labelled_images(model_name, num_images=num_calibration_images, **{**dataset, "split": "train"})
    with tempfile.TemporaryDirectory() as folder:
        files = {name: Path(folder) / f"{index}.onnx" for index, name in enumerate(("fp32", "dynamic", *METHODS))}
        export_onnx(model, files["fp32"], images[:3])
        quantize_onnx(files["fp32"], files["dynamic"])
        for method, quantize in METHODS.items():
            quantize(files["fp32"], files[method], calibration)
        runs = {name: run_session(path) for name, path in files.items()}
        logits = {name: torch.cat([run(batch) for batch in images.split(50)]) for name, run in runs.items()}
        noise = torch.randn(batch_size, *images.shape[1:], generator=torch.Generator().manual_seed(0))
        timed = {name: lambda run=run: run(noise) for name, run in runs.items()}
        seconds = interleave(timed, 15, warm_up=1)
        sizes = {name: path.stat().st_size for name, path in files.items()}
    answers = {name: values.argmax(dim=1) for name, values in logits.items()}
    rows = [
        {
            "int8": name,
            "top1": (answers[name] == labels).double().mean().item(),
            "agreement": (answers[name] == answers["fp32"]).double().mean().item(),
            "images_per_second": batch_size / statistics.median(seconds[name]),
            "speedup": speedup(seconds["fp32"], seconds[name]),
            "file_bytes": sizes[name],
        }
        for name in files
    ]
    environment = {**describe_environment(), "batch": batch_size, "images": num_images}
    return {"rows": rows, "environment": environment}


def print_table(figures: dict) -> None:
    header = ("int8", "top-1 (%)", "same class as fp32 (%)", "images/s", "x fp32", "file (MB)")
    rows = [
        (row["int8"], f"{100 * row['top1']:.2f}", f"{100 * row['agreement']:.2f}", f"{row['images_per_second']:.1f}",
         f"{row['speedup']:.2f}", f"{row['file_bytes'] / 1e6:.1f}")
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
    add("--show", type=Path, help="only print the table of figures written before")
    add_dataset_options(parser)
    arguments = parser.parse_args(argv)
    if arguments.show is None:
        if arguments.model is None:
            parser.error("name a model")
        figures = measure(arguments.model, arguments.num_images, arguments.num_calibration_images,
                          arguments.batch_size, **dataset_options(arguments))  # fmt: skip
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    else:
        figures = json.loads(arguments.show.read_text(encoding="utf-8"))
    print_table(figures)


if __name__ == "__main__":
    run_program("benchmark", main)
