"""Top-1, top-5 and throughput of an image classifier on a dataset.

    lambda-vit evaluate outputs/digits --dataset_name digits
    lambda-vit evaluate facebook/deit-base-patch16-224 --dataset_name ILSVRC/imagenet-1k --dtype bfloat16
    lambda-vit evaluate outputs/mine --dataset_dir path/to/images --output outputs/mine/evaluation.json
    accelerate launch --config_file trainer_scripts/accelerate_configs/two_cpu_processes.yaml \\
        -m lambda_vit_hf.cli.evaluate outputs/digits --dataset_name digits --device cpu

Takes any checkpoint with an image classification head. Labels are matched by class names, so the dataset may count its
classes in another order than the model. Unreadable images are left out and counted.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from .images import add_dataset_options, dataset_options, dataset_place
from .runner import program_parser, run_program


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = program_parser("evaluate", __doc__)
    add = parser.add_argument
    add("model", help="Hub id or folder of an image classifier")
    add("--split", default="validation", help="train or validation")
    add("--labels_by_index", action="store_true", help="trust the dataset's order of classes, whatever the names")
    add("--batch_size", type=int, default=64, help="per process")
    add("--num_workers", type=int, default=0, help="processes that decode images, per process")
    add("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    add("--device", choices=["auto", "cpu"], default="auto", help="auto: a GPU where there is one")
    add("--output", type=Path, help="write the figures to this JSON file")
    add_dataset_options(parser)
    arguments = parser.parse_args(argv)
    if dataset_place(arguments) is None:
        parser.error("name images: --dataset_dir, --dataset_name or --validation_dir")
    if arguments.output is not None and arguments.output.is_dir():
        parser.error(f"--output {arguments.output} is a folder: name a file in it")
    return arguments


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse_arguments(argv)

    import torch
    from accelerate import Accelerator
    from transformers import AutoImageProcessor

    from ..evaluation.classifier import load_classifier
    from ..evaluation.evaluate import check_has_classes, class_indices, evaluate_model, load_split, read_images
    from ..evaluation.throughput import describe_environment, environment_line

    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)  # before anything is measured
    accelerator = Accelerator(cpu=arguments.device == "cpu")
    with accelerator.main_process_first():
        dataset = load_split(split=arguments.split, **dataset_options(arguments))
    model = load_classifier(arguments.model, getattr(torch, arguments.dtype))
    check_has_classes(model.config)
    classes = class_indices(dataset.features["label"].names, model.config.id2label, arguments.labels_by_index)
    images = read_images(dataset, AutoImageProcessor.from_pretrained(arguments.model))
    figures = evaluate_model(model, images, accelerator, classes, arguments.batch_size, arguments.num_workers)
    if not accelerator.is_main_process:
        return
    environment = {
        **describe_environment(accelerator.device),
        "dtype": arguments.dtype,
        "batch": arguments.batch_size,
        "processes": accelerator.num_processes,
    }
    print(describe(arguments.model, figures))
    print(environment_line(environment))
    if arguments.output:
        source = {"model": arguments.model, "dataset": dataset_place(arguments)}
        values = {**source, "split": arguments.split, **figures, "environment": environment}
        arguments.output.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def describe(model: str, figures: dict) -> str:
    """One line: accuracy, images, speed."""
    accuracy = f"top-1 {100 * figures['accuracy']:.2f} %"
    if "top5_accuracy" in figures:
        accuracy += f", top-5 {100 * figures['top5_accuracy']:.2f} %"
    unreadable = f" ({figures['unreadable']} unreadable left out)" if figures["unreadable"] else ""
    whole, alone = figures["images_per_second"], figures["model_images_per_second"]
    speed = f"{whole:,.0f} images/s with decoding, {alone:,.0f} without"
    return f"{model}: {accuracy} on {figures['num_images']} images{unreadable}; {speed}"


if __name__ == "__main__":
    run_program("evaluate", main)
