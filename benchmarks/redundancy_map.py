"""Where is a model redundant? Top-1 without the attention of each layer and of each pair, nothing trained.

    python -m benchmarks.redundancy_map trainer_scripts/recipes/dinov2_small_fashion_mnist.yaml --dataset_dir DIR \\
        --base_model outputs/dinov2_small_fashion_mnist/base --sets "2 4 10" "2 4 5 9 10" --output outputs/map
    python -m benchmarks.redundancy_map results/redundancy_dinov2_small.json  # table and picture again

In the place of the attention: nothing (`skip`), the stream itself (`identity`, which doubles it), or, for single
layers, `--sets` and `--best_linear`, a linear map of each token fitted in closed form (`fit_linear_maps`).
Other options override fields of the recipe. Figures in OUTPUT.json, the picture in OUTPUT.png.
"""

import argparse
import itertools
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from benchmarks.figures import measured_or_read, read_recipe_or_figures
from lambda_vit_hf.evaluation.throughput import describe_environment, environment_line, markdown_table
from lambda_vit_hf.selection.masked_forward import MASKS


def read_command_line(argv: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--sets", nargs="*", default=[], help='more sets of layers, such as "2 4 10"')
    parser.add_argument("--best_linear", type=int, help="also choose so many layers for linear maps, and measure them")
    parser.add_argument("--no_pairs", action="store_true", help="single layers and --sets only; no picture")
    parser.add_argument("--num_masked_images", type=int, default=500, help="validation images, evenly spaced")
    parser.add_argument("--output", type=Path, default=Path("outputs/redundancy"))
    return read_recipe_or_figures(parser, argv)


def main(argv: list[str] | None = None) -> None:
    options, overrides = read_command_line(argv)
    figures = measured_or_read("benchmarks.redundancy_map", measure, options, overrides, argv)
    print_table(figures)
    depth = figures["depth"]
    if sum(len(layers) == 2 for layers in figures["sets"]) == depth * (depth - 1) // 2:  # not without the pairs
        draw(figures, options.output.with_suffix(".png"))


def measure(options: argparse.Namespace, overrides: list[str]) -> dict:
    from benchmarks.experiment import Experiment

    experiment = Experiment(options.recipe, overrides, options.output, num_masked_images=options.num_masked_images)
    base = experiment.base_model(0, options.base_model)
    depth = base.model.config.num_hidden_layers
    singles = [[layer] for layer in range(depth)]
    more = [[int(layer) for layer in one.split()] for one in options.sets]
    more += base.choose_for_linear_maps(options.best_linear or 0)
    pairs = [] if options.no_pairs else map(list, itertools.combinations(range(depth), 2))
    sets = [*singles, *pairs, *more]
    sets = list(map(list, dict.fromkeys(tuple(sorted(one)) for one in sets)))
    of_linear = list(map(list, dict.fromkeys(tuple(sorted(one)) for one in [*singles, *more])))
    return {
        "environment": describe_environment(experiment.training_args.device),
        "autocast_dtype": base.autocast_dtype,
        "num_images": len(base.validation),
        "num_calibration_images": len(base.calibration),
        "depth": depth,
        "whole": base.top1,
        "sets": sets,
        **{mask: base.measure_top1(sets, mask) for mask in MASKS},
        "linear": [base.measure_linear_map(one) for one in of_linear],
        "sets_of_linear": of_linear,
    }


def print_table(figures: dict) -> None:
    linear = {tuple(one): top1 for one, top1 in zip(figures["sets_of_linear"], figures["linear"], strict=True)}
    rows = [
        [" ".join(map(str, one)), *(f"{100 * value:.1f}" for value in (skip, identity, linear[tuple(one)]))]
        for one, skip, identity in zip(figures["sets"], figures["skip"], figures["identity"], strict=True)
        if tuple(one) in linear
    ]
    print(f"\nwhole model: {100 * figures['whole']:.1f} % of {figures['num_images']} images\n")
    print(markdown_table(["without the attention of", "skip (%)", "identity (%)", "linear map (%)"], rows))
    print(f"\n{environment_line(figures['environment'])}")


def draw(figures: dict, path: Path) -> None:
    """One map per mask: single layers on the diagonal, pairs beside it."""
    figure = Figure(figsize=(12, 5.4), layout="constrained")
    for axes, mask in zip(figure.subplots(1, 2), MASKS, strict=True):
        values = np.full((figures["depth"],) * 2, np.nan)
        for layers, top1 in zip(figures["sets"], figures[mask], strict=True):
            if len(layers) <= 2:
                values[layers[0], layers[-1]] = values[layers[-1], layers[0]] = 100 * top1
        image = axes.imshow(values, cmap="viridis", vmin=0, vmax=100)
        for row, column in itertools.product(range(len(values)), repeat=2):
            axes.text(column, row, f"{values[row, column]:.0f}", ha="center", va="center", fontsize=7,
                      color="white" if values[row, column] < 60 else "black")  # fmt: skip
        axes.set(title={"skip": "attention adds nothing", "identity": "attention is the identity"}[mask],
                 xlabel="layer (0 = nearest to the image)", ylabel="layer")  # fmt: skip
        axes.set_xticks(range(len(values)))
        axes.set_yticks(range(len(values)))
        figure.colorbar(image, ax=axes, label="top-1 (%)", shrink=0.8)
    figure.suptitle(f"Without the attention of two layers (diagonal: of one); whole {100 * figures['whole']:.1f} %")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
