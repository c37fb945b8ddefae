"""Measure inference on this machine: throughput, latency, memory, size. Prints Markdown, writes JSON and a picture.

    lambda-vit benchmark --size base                           # DeiT-B's shape; under 5 minutes on a CPU
    lambda-vit benchmark --size small --batch_sizes 1 8 32 --dtype bf16 --compile
    lambda-vit benchmark --engines --max_seconds 600           # onnxruntime in fp32 and int8, and OpenVINO
    lambda-vit benchmark --device cuda --dtype bf16 --batch_sizes 256 --compile
    lambda-vit benchmark --model outputs/digits/base --dataset_name digits --merging_r 1 \\
        --variants transformers outputs/digits outputs/digits+prepared+bf16 outputs/digits+merged+prepared+onnx+int8

Variants run in turns, in one process; ratios are taken round by round, and their median is shown: against the first,
and against transformers' model in the same engine and precision, which is added where it is missing. Weights are
random unless --model names a checkpoint: speed does not depend on them. A variant is a source (transformers, timm,
lambda, a checkpoint, an ONNX file) and steps: removed, folded, merged, stacked (one projection for query, key and
value), prepared (stacked, and only the class token from the last attention on), fp32, bf16, fp16, compiled, exported,
onnx, int8, openvino. Files in --output_dir: inference.json, inference.md and inference.png.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from .images import add_dataset_options, dataset_options, dataset_place
from .runner import Renamed, program_parser, run_program


CPU_VARIANTS = [
    "transformers", "timm+removed", "lambda+removed+folded+stacked", "lambda+removed+folded+prepared",
    "transformers+bf16", "timm+removed+bf16", "lambda+removed+folded+stacked+bf16",
    "lambda+removed+folded+prepared+bf16", "lambda+removed+folded+merged+prepared+bf16",
]  # fmt: skip
VARIANTS = ["transformers", "timm", "timm+removed", "lambda+removed+folded", "lambda+removed+folded+prepared",
            "lambda+removed+folded+merged+prepared"]  # fmt: skip
ENGINE_VARIANTS = [
    "lambda+removed+folded+prepared+onnx", "lambda+removed+folded+merged+prepared+onnx",
    "lambda+removed+folded+prepared+onnx+int8", "lambda+removed+folded+merged+prepared+onnx+int8",
]  # fmt: skip
OPENVINO_VARIANTS = ["lambda+removed+folded+prepared+openvino", "lambda+removed+folded+merged+prepared+openvino"]
_ENGINES = {"onnx", "openvino", "exported", "compiled"}


def add_setup_arguments(parser: argparse.ArgumentParser, size: str, dtypes: Sequence[str]) -> None:
    """The options that every benchmark has."""
    add = parser.add_argument
    add("--size", choices=["tiny", "small", "base"], default=size, help=f"DeiT's shapes; default {size}")
    add("--model", help="start from this ViT checkpoint instead of random weights")
    add("--removed_layers", "--layers", action=Renamed, type=int, nargs="+", default=[0, 1, 3, 4, 6],
        help="what `removed` removes; default DeiT-B's 40 %%")  # fmt: skip
    add("--device", default="cpu", help="cpu or cuda")
    add("--dtype", choices=dtypes, help="default fp32")
    add("--output_dir", type=Path, default=Path("outputs/benchmark"))


def read_setup(arguments: argparse.Namespace, **changes):
    """The [`BenchmarkSetup`] of options added by [`add_setup_arguments`]."""
    from ..export.variants import BenchmarkSetup

    return BenchmarkSetup(
        size=arguments.size,
        model=arguments.model,
        removed_layers=tuple(arguments.removed_layers),
        dtype=arguments.dtype or "fp32",
        device=arguments.device,
        **changes,
    )


def write_result(name: str, result: dict, table: str, output_dir: Path) -> None:
    """Print the table, and write it and its figures to NAME.md and NAME.json."""
    from ..evaluation.throughput import environment_line

    text = "\n\n".join([table, *result.get("notes", []), environment_line(result["environment"])])
    print(text)
    output_dir.mkdir(parents=True, exist_ok=True)
    (output_dir / f"{name}.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    (output_dir / f"{name}.md").write_text(text + "\n", encoding="utf-8")
    print(f"\nWritten to {output_dir}: {', '.join(sorted(path.name for path in output_dir.glob(f'{name}.*')))}")


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = program_parser("benchmark", __doc__)
    add_setup_arguments(parser, "base", ["fp32", "bf16", "fp16"])
    add = parser.add_argument
    add("--variants", "--contenders", action=Renamed, nargs="+", help="see above; speed-ups are against the first")
    add("--batch_sizes", type=int, nargs="+", default=[1, 8])
    add("--compile", action="store_true", help="compare each torch variant compiled, too")
    add("--engines", action="store_true", help="onnxruntime, in fp32 and int8, and OpenVINO, if installed, too")
    add("--merging_r", type=int, default=24, help="of the step `merged`: tokens per block that keeps attention")
    add("--merging_start", type=int, default=1, help="of the step `merged`: first such block that merges")
    add("--max_rounds", type=int, default=30)
    add("--max_seconds", type=float, default=200.0, help="no new round after it (but 3 in any case)")
    add("--show", type=Path, help="print and draw an inference.json again")
    add("--no_memory", action="store_true", help="leave out peak memory")
    add("--num_images", type=int, default=2000, help="to measure top-1 on, of the validation split, evenly spaced")
    add_dataset_options(parser)
    if not argv:
        parser.error("give at least one option, such as --size base")
    if argv[0] in ("training", "input", "search"):
        parser.error(f"`{argv[0]}` is a program of a checkout now: python -m benchmarks.{argv[0]}_speed")
    arguments = parser.parse_args(argv[1:] if argv[0] == "inference" else argv)  # the first word of old commands
    if min(arguments.num_images, arguments.max_rounds, *arguments.batch_sizes) < 1:
        parser.error("--batch_sizes, --num_images and --max_rounds must be 1 or more")
    if dataset_place(arguments) is not None and not arguments.model:
        parser.error("accuracy needs trained weights: name a checkpoint with --model")
    return arguments


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse_arguments(sys.argv[1:] if argv is None else argv)

    from ..evaluation.throughput import environment_line
    from ..export.inference_speed import inference_table, measure_inference
    from ..export.speed_picture import plot_inference
    from ..export.variants import parse_variant, with_partners

    if arguments.show is not None:
        result = json.loads(arguments.show.read_text(encoding="utf-8"))
        if not (isinstance(result, dict) and {"rows", "environment"} <= result.keys()):
            raise ValueError(f"{arguments.show} is no inference.json, as this program writes it.")
        arguments.output_dir.mkdir(parents=True, exist_ok=True)
        plot_inference(result, arguments.output_dir / "inference.png")
        print(f"{inference_table(result)}\n\n{environment_line(result['environment'])}")
        return
    names = arguments.variants
    if names is None:
        names = CPU_VARIANTS if arguments.device == "cpu" and arguments.dtype is None else VARIANTS
    if arguments.compile:
        names = [*names, *(f"{name}+compiled" for name in names if not _ENGINES & set(name.split("+")))]
    if arguments.engines:
        names = [*names, *ENGINE_VARIANTS, *(OPENVINO_VARIANTS if find_spec("openvino") else [])]
    for name in names:
        parse_variant(name, arguments.dtype or "fp32")  # refused before any model is built
    arguments.output_dir.mkdir(parents=True, exist_ok=True)  # before anything is measured
    labelled = None
    if dataset_place(arguments) is not None:
        from ..evaluation.evaluate import labelled_images

        labelled = labelled_images(arguments.model, num_images=arguments.num_images, **dataset_options(arguments))
    setup = read_setup(arguments, merging_r=arguments.merging_r, merging_start=arguments.merging_start)
    names = with_partners(names, setup)
    result = measure_inference(names, setup, arguments.batch_sizes, arguments.max_rounds, arguments.max_seconds,
                               not arguments.no_memory, labelled)  # fmt: skip
    plot_inference(result, arguments.output_dir / "inference.png")
    write_result("inference", result, inference_table(result), arguments.output_dir)


if __name__ == "__main__":
    run_program("benchmark", main)
