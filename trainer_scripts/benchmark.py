"""Measure on this machine: inference, training, image input, search for layers. Prints Markdown, writes JSON.

    python trainer_scripts/benchmark.py                              # inference, DeiT-B shape; under 5 minutes
    python trainer_scripts/benchmark.py inference --size small --batch_sizes 1 8 32 --dtype bf16 --compile
    python trainer_scripts/benchmark.py inference --contenders transformers lambda+removed+folded+prepared \
        lambda+removed+folded+merged+prepared+bf16 lambda+removed+folded+merged+prepared+onnx+int8
    python trainer_scripts/benchmark.py inference --device cuda --dtype bf16 --batch_sizes 256 --compile
    python trainer_scripts/benchmark.py inference --model outputs/digits/base --dataset_name digits --merging_r 1 \
        --contenders transformers outputs/digits outputs/digits+prepared+bf16 outputs/digits+merged+prepared+onnx+int8
    python trainer_scripts/benchmark.py training                     # a Trainer step while diluting, and after
    python trainer_scripts/benchmark.py input                        # is reading or the model the bottleneck?
    python trainer_scripts/benchmark.py search --num_layers 2        # prefix reuse against the naive search

What is compared runs in turns, in one process; ratios are taken round by round, and their median is shown. Weights are
random unless --model names a checkpoint: speed does not depend on them. Contenders are a source (transformers, timm,
lambda, a checkpoint, an ONNX file) and steps: removed, folded, merged, stacked (one projection for query, key and
value), prepared (stacked, and only the class token from the last attention on), fp32, bf16, fp16, compiled, exported,
onnx, int8. Files go to --output_dir: COMMAND.json, COMMAND.md and, for inference, inference.png.
"""

import argparse
import json
import sys
from pathlib import Path


COMMANDS = ("inference", "training", "input", "search")
CPU_CONTENDERS = [
    "transformers", "timm+removed", "lambda+removed+folded+stacked", "lambda+removed+folded+prepared",
    "transformers+bf16", "timm+removed+bf16", "lambda+removed+folded+stacked+bf16",
    "lambda+removed+folded+prepared+bf16", "lambda+removed+folded+merged+prepared+bf16",
]  # fmt: skip
CONTENDERS = ["transformers", "timm", "timm+removed", "lambda+removed+folded", "lambda+removed+folded+prepared",
              "lambda+removed+folded+merged+prepared"]  # fmt: skip


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    common = argparse.ArgumentParser(add_help=False)
    add = common.add_argument
    add("--size", choices=["tiny", "small", "base"], help="DeiT's shapes; default base (inference), else small")
    add("--model", help="start from this ViT checkpoint instead of random weights")
    add(
        "--layers", type=int, nargs="+", default=[0, 1, 3, 4, 6], help="what `removed` removes; default DeiT-B's 40 %%"
    )
    add("--device", default="cpu", help="cpu or cuda")
    add("--dtype", choices=["fp32", "bf16", "fp16"], help="default fp32; training knows fp32 and bf16")
    add("--output_dir", type=Path, default=Path("outputs/benchmark"))
    commands = parser.add_subparsers(dest="command", required=True)
    add = commands.add_parser("inference", parents=[common], help="throughput, latency, memory, size").add_argument
    add("--contenders", nargs="+", help="see above; speed-ups are against the first")
    add("--batch_sizes", type=int, nargs="+", default=[1, 8])
    add("--compile", action="store_true", help="compare each torch contender compiled, too")
    add("--merging_r", type=int, default=24, help="of the step `merged`: tokens per block that keeps attention")
    add("--merging_start", type=int, default=1, help="of the step `merged`: first such block that merges")
    add("--max_rounds", type=int, default=30)
    add("--max_seconds", type=float, default=200.0, help="no new round after it (but 3 in any case)")
    add("--no_memory", action="store_true", help="leave out peak memory")
    add("--dataset_name", help="measure top-1 on this dataset's validation split too: Hub id, or `digits`")
    add("--dataset_dir", help="the same from a folder")
    add("--num_images", type=int, default=2000, help="of that split, evenly spaced")
    add = commands.add_parser("training", parents=[common], help="cost of dilution, gain of removal").add_argument
    add("--batch_size", type=int, default=8)
    add("--steps", type=int, default=20, help="timed while diluting, and as many at lambda = 0")
    add("--guard", action="store_true", help="with StopOnNonFiniteGradient beside the callback")
    add = commands.add_parser(
        "input", parents=[common], help="decoding and augmentation against the model"
    ).add_argument
    add("--batch_size", type=int, default=16)
    add("--rounds", type=int, default=5)
    add = commands.add_parser("search", parents=[common], help="prefix reuse against the naive search").add_argument
    add("--num_layers", type=int, default=2, help="attention layers to choose")
    add("--num_images", type=int, default=64)
    add("--batch_size", type=int, default=16)
    if not argv or (argv[0] not in COMMANDS and argv[0] not in ("-h", "--help")):
        argv = ["inference", *argv]
    arguments = parser.parse_args(argv)
    known = {"inference": ("fp32", "bf16", "fp16"), "search": ("fp32",)}.get(arguments.command, ("fp32", "bf16"))
    if arguments.dtype not in (None, *known):
        parser.error(f"{arguments.command} knows --dtype {' and '.join(known)}")
    return arguments


def main(argv: list[str] | None = None) -> None:
    arguments = parse_arguments(sys.argv[1:] if argv is None else argv)

    from lambda_vit_hf.evaluation.throughput import environment_line
    from lambda_vit_hf.export.contenders import Contest

    contest = Contest(
        size=arguments.size or ("base" if arguments.command == "inference" else "small"),
        model=arguments.model,
        layers=tuple(arguments.layers),
        dtype=arguments.dtype or "fp32",
        device=arguments.device,
        merging_r=getattr(arguments, "merging_r", 0),
        merging_start=getattr(arguments, "merging_start", 0),
    )
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    result, table = globals()[f"run_{arguments.command}"](arguments, contest)
    text = "\n\n".join([table, *result.get("notes", []), environment_line(result["environment"])])
    print(text)
    path = arguments.output_dir / arguments.command
    path.with_suffix(".json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    path.with_suffix(".md").write_text(text + "\n", encoding="utf-8")
    print(
        f"\nWritten to {arguments.output_dir}: {', '.join(sorted(p.name for p in path.parent.glob(path.name + '.*')))}"
    )


def run_inference(arguments: argparse.Namespace, contest) -> tuple[dict, str]:
    from lambda_vit_hf.export.inference_speed import inference_table, measure_inference
    from lambda_vit_hf.export.speed_picture import plot_inference

    names = arguments.contenders
    if names is None:
        names = CPU_CONTENDERS if arguments.device == "cpu" and arguments.dtype is None else CONTENDERS
    if arguments.compile:
        engines = {"onnx", "exported", "compiled"}
        names = [*names, *(f"{name}+compiled" for name in names if not engines & set(name.split("+")))]
    labelled = None
    if arguments.dataset_name or arguments.dataset_dir:
        labelled = read_labelled(arguments, contest)
    result = measure_inference(names, contest, arguments.batch_sizes, arguments.max_rounds, arguments.max_seconds,
                               not arguments.no_memory, labelled)  # fmt: skip
    plot_inference(result, arguments.output_dir / "inference.png")
    return result, inference_table(result)


def read_labelled(arguments: argparse.Namespace, contest):
    from lambda_vit_hf.evaluation.evaluate import labelled_images

    if contest.model is None:
        raise SystemExit("Accuracy needs trained weights: name a checkpoint with --model.")
    return labelled_images(contest.model, arguments.dataset_name, arguments.dataset_dir, arguments.num_images)


def run_training(arguments: argparse.Namespace, contest) -> tuple[dict, str]:
    from benchmarks.training_speed import measure_training, training_table

    result = measure_training(contest, arguments.batch_size, arguments.steps, contest.dtype == "bf16", arguments.guard)
    return result, training_table(result)


def run_input(arguments: argparse.Namespace, contest) -> tuple[dict, str]:
    from benchmarks.input_speed import input_table, measure_input

    result = measure_input(contest, arguments.batch_size, arguments.rounds)
    return result, input_table(result)


def run_search(arguments: argparse.Namespace, contest) -> tuple[dict, str]:
    from benchmarks.search_speed import measure_search, search_table

    result = measure_search(contest, arguments.num_layers, arguments.num_images, arguments.batch_size)
    return result, search_table(result)


if __name__ == "__main__":
    main()
