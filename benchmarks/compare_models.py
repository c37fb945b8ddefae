"""One table of image classifiers on one dataset: top-1, parameters, multiply-accumulates, speed taken in turns.

    python -m benchmarks.compare_models outputs/three/base outputs/three outputs/five --dataset_dir path/to/images \\
        --dtype bfloat16 --batch_size 100 --output results/mine.json
    python -m benchmarks.compare_models --show results/dinov2_small_linear_maps.json  # prints the table again

Top-1 is what `lambda-vit evaluate` finds. The speeds are medians over rounds in which each model has its turn on the
same batch, so a noisy minute of the machine hits all alike.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from transformers import AutoImageProcessor

import lambda_vit_hf  # noqa: F401 - the Auto classes know its models
from lambda_vit_hf.data.dataset import collate
from lambda_vit_hf.evaluation.accounting import count_macs, count_parameters
from lambda_vit_hf.evaluation.classifier import load_classifier
from lambda_vit_hf.evaluation.evaluate import class_indices, evaluate_model, load_split, read_images
from lambda_vit_hf.evaluation.throughput import (
    describe_environment,
    environment_line,
    images_per_second,
    markdown_table,
)
from lambda_vit_hf.models.image_size import as_pair


HEADER = ("model", "top-1 (%)", "parameters", "MACs", "images/s", "layers removed")


def measure(folders: Sequence[str], dataset, dtype: torch.dtype, batch_size: int, rounds: int) -> list[dict]:
    """
    One row for each folder: its figures, `images_per_second` of the forward pass alone.

    Raises:
        ValueError: if the models take images of different sizes: their speeds would not compare.
    """
    models = {folder: load_classifier(folder, dtype) for folder in folders}
    sizes = {as_pair(model.config.image_size) for model in models.values()}
    if len(sizes) > 1:
        raise ValueError(f"The models must take images of one size, got {sorted(sizes)}.")
    accelerator, rows, batch = Accelerator(), [], None
    for folder, model in models.items():
        images = read_images(dataset, AutoImageProcessor.from_pretrained(folder))
        classes = class_indices(dataset.features["label"].names, model.config.id2label)
        figures = evaluate_model(model, images, accelerator, classes, batch_size)
        rows.append(
            {
                "model": folder,
                "top1": figures["accuracy"],
                "num_images": figures["num_images"],
                "parameters": count_parameters(model),
                "macs": count_macs(model.config),
                "removed_layers": list(getattr(model.config, "removed_layers", ())),
            }
        )
        if batch is None:
            batch = collate([images[index] for index in range(min(batch_size, len(images)))])["pixel_values"]
    speeds = images_per_second(models, batch.to(accelerator.device, dtype), rounds, max_seconds=600)
    return [{**row, "images_per_second": speeds[row["model"]]} for row in rows]


def as_table(rows: Sequence[dict]) -> str:
    cells = [
        (
            row["model"],
            f"{100 * row['top1']:.2f}",
            f"{row['parameters'] / 1e6:.1f} M",
            f"{row['macs'] / 1e6:,.0f} M",
            f"{row['images_per_second']:,.0f}",
            " ".join(map(str, row["removed_layers"])),
        )
        for row in rows
    ]
    return markdown_table(HEADER, cells)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.compare_models",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("models", nargs="*", help="folders or Hub ids of image classifiers, of one image size")
    parser.add_argument("--dataset_name", help="digits, or a dataset of the Hub")
    parser.add_argument("--dataset_dir", help="images in a folder")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=15, help="turns of each model (default: %(default)s)")
    parser.add_argument("--output", type=Path, help="write the figures to this JSON file")
    parser.add_argument("--show", type=Path, help="print the figures of this JSON file, measure nothing")
    arguments = parser.parse_args(argv)
    if arguments.show:
        figures = json.loads(arguments.show.read_text(encoding="utf-8"))
        print(f"{as_table(figures['rows'])}\n{environment_line(figures['environment'])}")
        return
    if not arguments.models:
        parser.error("name models, or --show a file")
    dataset = load_split(arguments.dataset_name, arguments.dataset_dir)
    dtype = getattr(torch, arguments.dtype)
    rows = measure(arguments.models, dataset, dtype, arguments.batch_size, arguments.rounds)
    environment = {
        **describe_environment(Accelerator().device),
        "dtype": arguments.dtype,
        "batch": arguments.batch_size,
    }
    print(as_table(rows))
    print(environment_line(environment))
    if arguments.output:
        values = {"dataset": arguments.dataset_name or arguments.dataset_dir, "environment": environment, "rows": rows}
        arguments.output.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
