"""Whether reading images or training on them is the bottleneck: images/s of both, measured here.

python -m benchmarks.input_speed --size small
"""

import copy
import os
import statistics
import tempfile
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Sequence
from pathlib import Path

import datasets
import PIL.Image
import torch
from transformers import ViTImageProcessor

from lambda_vit_hf.cli.benchmark import add_setup_arguments, read_setup, write_result
from lambda_vit_hf.cli.runner import run_program
from lambda_vit_hf.data.augmentation import deit_augmentation
from lambda_vit_hf.data.dataset import ProcessedImages
from lambda_vit_hf.evaluation.throughput import describe_environment, interleave, markdown_table
from lambda_vit_hf.export.variants import BenchmarkSetup


PHOTOGRAPH_SIZE = (500, 375)  # ImageNet's usual size


def write_photographs(folder: Path, num_images: int, quality: int = 96) -> datasets.Dataset:
    """
    JPEGs like ImageNet's: crops of the two photographs that ship with scikit-learn, 500 x 375 pixels.

    Args:
        folder (`Path`): where to write them.
        num_images (`int`): how many.
        quality (`int`, *optional*, defaults to 96): of the JPEGs; gives ImageNet's 50 to 150 KB.

    Returns:
        `datasets.Dataset`: with columns `image` and `label`.
    """
    from sklearn.datasets import load_sample_images

    photographs = [PIL.Image.fromarray(image) for image in load_sample_images().images]
    paths = []
    for index in range(num_images):
        photograph = photographs[index % len(photographs)]
        margin = 7 * index % 100
        crop = photograph.crop((margin, margin // 2, photograph.width - margin, photograph.height - margin // 2))
        paths.append(str(folder / f"{index}.jpg"))
        crop.resize(PHOTOGRAPH_SIZE, PIL.Image.Resampling.BICUBIC).save(paths[-1], quality=quality)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["one", "two"])})
    labels = [index % 2 for index in range(num_images)]
    return datasets.Dataset.from_dict({"image": paths, "label": labels}, features=features)


def measure_input(setup: BenchmarkSetup, batch_size: int = 16, rounds: int = 5) -> dict:
    """
    Images/s of one core that decodes and augments, and of the model in training, in turns.

    Args:
        setup ([`BenchmarkSetup`]): the model's shape, the layers removed from it, the device.
        batch_size (`int`, *optional*, defaults to 16): images per turn, and per training step.
        rounds (`int`, *optional*, defaults to 5): timed turns of each, after one to warm up.

    Returns:
        `dict`: `rows` of name, what it is and images/s; `cores_needed` to keep the model busy with augmented images;
        `limit`: which of the two limits on this machine; `environment`; JSON-serialisable.
    """
    threads = torch.get_num_threads()
    size = setup.base_model.config.image_size
    processor = ViTImageProcessor(size={"height": size, "width": size})
    with tempfile.TemporaryDirectory() as folder:
        photographs = write_photographs(Path(folder), batch_size)
        readers = {
            "evaluation: decode, resize, normalize": ProcessedImages(photographs, processor),
            "training: decode, DeiT's augmentation": ProcessedImages(
                photographs, processor, deit_augmentation(processor)
            ),
        }
        indices = list(range(batch_size))
        runs = {name: lambda reader=reader: reader.__getitems__(indices) for name, reader in readers.items()}
        torch.set_num_threads(1)
        try:
            seconds = interleave(runs, rounds, warm_up=1)
        finally:
            torch.set_num_threads(threads)
    seconds |= _time_training_steps(setup, batch_size, rounds)
    speeds = {name: batch_size / statistics.median(times) for name, times in seconds.items()}
    rows = [{"name": name, "images_per_second": speed} for name, speed in speeds.items()]
    read, consumed = rows[1]["images_per_second"], rows[-1]["images_per_second"]
    # A GPU leaves all cores to the readers; on the CPU the model takes them.
    cores = os.cpu_count() if setup.device != "cpu" else 1
    return {
        "rows": rows,
        "cores_needed": consumed / read,
        "limit": "reading" if consumed > read * cores else "the model",
        "cores": cores,
        "size": setup.size,
        "environment": {**describe_environment(setup.device), "batch": batch_size},
    }


def _time_training_steps(setup: BenchmarkSetup, batch_size: int, rounds: int) -> dict[str, list[float]]:
    """Forward, backward and AdamW of the model, whole and with its layers removed."""
    runs = {}
    steps = {"training step, all attention": (), "training step, layers removed": setup.removed_layers}
    for name, layers in steps.items():
        model = copy.deepcopy(setup.base_model)
        if layers:
            model.remove_attention(list(layers))
            model.fold_removed_attention()
        model.to(setup.device).train()
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        size = model.config.image_size
        images = torch.randn(batch_size, model.config.num_channels, size, size, device=setup.device)
        labels = torch.zeros(batch_size, dtype=torch.long, device=setup.device)

        def step(model=model, optimizer=optimizer, images=images, labels=labels):
            with torch.autocast(torch.device(setup.device).type, torch.bfloat16, enabled=setup.dtype == "bf16"):
                loss = model(images, labels=labels).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        runs[name] = step
    return interleave(runs, rounds, warm_up=1, device=setup.device)


def input_table(result: dict) -> str:
    """The rows of [`measure_input`] in Markdown, with the conclusion below."""
    rows = [[row["name"], f"{row['images_per_second']:,.1f}"] for row in result["rows"]]
    table = markdown_table(["what", "images/s"], rows)
    return (
        f"{table}\n\nReading is per core. The model (size {result['size']}, layers removed) takes in as many augmented"
        f" images as {result['cores_needed']:.2f} cores prepare: on this machine {result['limit']} limits."
    )


def main(argv: Sequence[str] | None = None) -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    add_setup_arguments(parser, "small", ["fp32", "bf16"])
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args(argv)
    setup = read_setup(arguments)
    result = measure_input(setup, arguments.batch_size, arguments.rounds)
    write_result("input", result, input_table(result), arguments.output_dir)


if __name__ == "__main__":
    run_program("benchmark", main)
