"""What of NOSE's protocol changes the layers that it picks? One model, one change at a time.

    python -m benchmarks.selection_protocol trainer_scripts/recipes/dinov2_small_fashion_mnist.yaml \\
        --dataset_dir DIR --base_model outputs/dinov2_small_fashion_mnist/base --output outputs/protocol
    python -m benchmarks.selection_protocol results/protocol_dinov2_small.json  # prints the table again

Changed in turn: the number of images, validation in place of training images, images augmented as DeiT's, the dtype,
the magnitude or the value of transfer entropy, the other mask, and moments of each batch in place of those of all
images (entropies are averaged then, as a script does that prints one figure per batch). Other options override fields
of the recipe.
"""

import argparse
from pathlib import Path

import torch
from torch.utils.data import Subset

from benchmarks.figures import measured_or_read, read_recipe_or_figures
from lambda_vit_hf.data.sampling import evenly_spaced
from lambda_vit_hf.evaluation.throughput import describe_environment, environment_line, markdown_table
from lambda_vit_hf.selection.entropy import GaussianEntropy
from lambda_vit_hf.selection.masked_forward import MASKS
from lambda_vit_hf.selection.search import AttentionSearch
from lambda_vit_hf.selection.strategies import greedy


def read_command_line(argv: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--num_removed", type=int, default=6)
    parser.add_argument("--num_images", type=int, nargs="+", default=[256, 32, 64, 128, 512])
    parser.add_argument("--fade_to", default="skip", help="what the mask of the reference does: skip or identity")
    parser.add_argument("--output", type=Path, default=Path("outputs/protocol"))
    return read_recipe_or_figures(parser, argv)


def main(argv: list[str] | None = None) -> None:
    options, overrides = read_command_line(argv)
    print_table(measured_or_read("benchmarks.selection_protocol", measure, options, overrides, argv))


def measure(options: argparse.Namespace, overrides: list[str]) -> dict:
    from benchmarks.experiment import Experiment

    number, *others = options.num_images
    experiment = Experiment(
        options.recipe, [*overrides, "--calibration_size", str(number)], options.output, num_masked_images=1
    )
    base = experiment.base_model(0, options.base_model)
    images = {name: experiment.images(options.base_model, name) for name in ("clean", "validation", "augmented")}

    def take(name: str, size: int) -> torch.Tensor:
        items = Subset(images[name], evenly_spaced(len(images[name]), size))
        return torch.stack([item["pixel_values"] for item in items])

    dtype, mask = base.autocast_dtype, options.fade_to
    other_mask = next(one for one in MASKS if one != mask)
    other_dtype = None if dtype else "bfloat16"
    rows: list[dict] = []

    def add(change: str, pixel_values: torch.Tensor, strategy="nose", autocast_dtype=dtype, **choices) -> None:
        base.calibration, base.autocast_dtype = pixel_values, autocast_dtype
        selection = base.select(strategy, options.num_removed, **{"mask": mask, **choices})
        rows.append({"change": change, "order": selection.order, "num_images": len(pixel_values)})
        print(f"{change}: {selection.order}", flush=True)

    reference = take("clean", number)
    add("none: the reference", reference)
    for size in others:
        add("number of images", take("clean", size))
    add("validation images", take("validation", number))
    add("augmented images", take("augmented", number))
    add(f"computed in {other_dtype or 'float32'}", reference, autocast_dtype=other_dtype)
    add("least value, not magnitude", reference, compare="value")
    add(f"mask {other_mask}", reference, mask=other_mask)
    add("entropy of each batch of 64, averaged", reference, strategy=nose_of_batches)
    return {
        "environment": describe_environment(experiment.training_args.device), "autocast_dtype": dtype, "mask": mask,
        "rows": rows,
    }  # fmt: skip


def nose_of_batches(search: AttentionSearch) -> list[int]:
    """NOSE by the mean over batches of each batch's own transfer entropy."""

    def sizes(sets: list[list[int]]) -> list[float]:
        values = torch.zeros(1 + len(sets), dtype=torch.float64)

        def measure(pixel_values: torch.Tensor, folds: torch.Tensor) -> None:
            for (position,), features in search.forward(pixel_values, [[], *sets]):
                of_batch = GaussianEntropy()
                of_batch.update(features)
                values[position] += of_batch.value()

        search.passes.for_each_batch(measure, "entropy of batches")
        return [search.size((values[0] - value).item()) for value in values[1:]]

    return greedy(search.candidates, search.num_layers, sizes)


def print_table(figures: dict) -> None:
    reference = figures["rows"][0]["order"]
    halves = sorted({len(reference) // 2, len(reference)})
    rows = [
        [
            row["change"], row["num_images"], " ".join(map(str, row["order"])),
            *(f"{len(set(row['order'][:half]) & set(reference[:half]))} of {half}" for half in halves),
        ]
        for row in figures["rows"]
    ]  # fmt: skip
    header = ["changed", "images", "picked, in order", *(f"same of {half}" for half in halves)]
    print(f"\n{markdown_table(header, rows)}\n\n{environment_line(figures['environment'])}")


if __name__ == "__main__":
    main()
