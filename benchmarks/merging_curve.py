"""What does merging tokens cost, and what does it gain? Top-1 and images/s by r, of a whole and a removed model.

    python -m benchmarks.merging_curve trainer_scripts/recipes/digits.yaml --base_model outputs/digits/base \\
        --removed_model outputs/digits --output outputs/merging
    python -m benchmarks.merging_curve outputs/merging.json  # table and picture again

r pairs of tokens merge in each block that keeps attention, in models that were trained without; `--fine_tuned` models
have a `token_merging_r` of their own, with which they are measured beside. All are prepared for inference, and timed
in turns. `--image_size` takes larger images, and so more tokens, than a model was trained with; `--bf16 true` computes
in bfloat16; other options override fields of the recipe. Figures in OUTPUT.json, the picture in OUTPUT.png.
"""

import argparse
import statistics
from pathlib import Path

import torch
from accelerate import Accelerator
from matplotlib.figure import Figure
from torch.utils.data import Subset
from tqdm.auto import tqdm

from benchmarks.figures import measured_or_read, read_recipe_or_figures
from lambda_vit_hf.data.dataset import collate
from lambda_vit_hf.data.sampling import evenly_spaced
from lambda_vit_hf.evaluation.accounting import count_macs
from lambda_vit_hf.evaluation.classifier import load_classifier
from lambda_vit_hf.evaluation.evaluate import evaluate_model
from lambda_vit_hf.evaluation.throughput import (
    describe_environment,
    environment_line,
    interleave,
    markdown_table,
    speedup,
)
from lambda_vit_hf.models.families import AutoLambdaModelForImageClassification


def read_command_line(argv: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--removed_model", help="a trained classifier with less attention")
    add("--fine_tuned", nargs="*", default=[], help="classifiers that were trained with merging")
    add("--r", type=int, nargs="+", default=[0, 2, 4, 6, 8], help="tokens merged per block (default: %(default)s)")
    add("--start", type=int, default=0, help="first merging block, among those with attention")
    add("--num_images", type=int, help="validation images, evenly spaced (default: all)")
    add("--batch_size", type=int, default=32)
    add("--rounds", type=int, default=15, help="turns of each model (default: %(default)s)")
    add("--output", type=Path, default=Path("outputs/merging"))
    return read_recipe_or_figures(parser, argv)


def main(argv: list[str] | None = None) -> None:
    options, overrides = read_command_line(argv)
    figures = measured_or_read("benchmarks.merging_curve", measure, options, overrides, argv)
    print_table(figures)
    draw(figures, options.output.with_suffix(".png"))


@torch.inference_mode()
def measure(options: argparse.Namespace, overrides: list[str]) -> dict:
    """
    Rows of the whole model, the removed one and those fine-tuned, in this order; `speedup` is over the first.

    Raises:
        ValueError: if a model's family cannot merge tokens, or its classes are not the dataset's.
    """
    from benchmarks.experiment import Experiment

    experiment = Experiment(options.recipe, overrides, options.output)
    args, accelerator = experiment.training_args, Accelerator(cpu=experiment.training_args.use_cpu)
    dtype = torch.bfloat16 if args.bf16 else torch.float32
    folders = {"whole": options.base_model, "removed": options.removed_model}
    wanted = [(name, folder, r) for name, folder in folders.items() if folder for r in options.r]
    wanted += [(f"fine-tuned: {folder}", folder, None) for folder in options.fine_tuned]
    rows, runs, images = [], {}, {}
    for name, folder, r in tqdm(wanted, desc="top-1", disable=args.disable_tqdm):
        if folder not in images:
            validation = experiment.images(folder, "validation")
            images[folder] = Subset(validation, evenly_spaced(len(validation), options.num_images))
        model = load_classifier(folder, model_class=AutoLambdaModelForImageClassification)
        if experiment.model_args.image_size is not None:
            model.set_image_size(experiment.model_args.image_size)
        if r is not None:
            model.set_token_merging(r, start=options.start)
        model.prepare_for_inference().to(args.device, dtype)
        figures = evaluate_model(model, images[folder], accelerator, batch_size=options.batch_size)
        batch = [images[folder][index] for index in range(min(options.batch_size, len(images[folder])))]
        pixel_values = collate(batch)["pixel_values"].to(args.device, dtype)
        runs[str(len(rows))] = lambda model=model, pixel_values=pixel_values: model(pixel_values)
        rows.append(
            {
                "model": name,
                "removed_layers": model.config.removed_layers,
                "r": model.config.token_merging_r,
                "top1": figures["accuracy"],
                "num_images": figures["num_images"],
                "macs": count_macs(model.config),
            }
        )
    seconds = list(interleave(runs, options.rounds, device=args.device).values())
    for row, times in zip(rows, seconds, strict=True):
        row["images_per_second"] = len(pixel_values) / statistics.median(times)
        row["speedup"] = speedup(seconds[0], times)
    environment = {
        **describe_environment(args.device),
        "dtype": str(dtype).removeprefix("torch."),
        "batch": len(pixel_values),
        "images": rows[0]["num_images"],
    }
    return {"rows": rows, "environment": environment}


def print_table(figures: dict) -> None:
    header = ("model", "layers removed", "r", "top-1 (%)", "images/s", "times", "by arithmetic")
    macs = figures["rows"][0]["macs"]
    rows = [
        (row["model"], " ".join(map(str, row["removed_layers"])), row["r"], f"{100 * row['top1']:.2f}",
         f"{row['images_per_second']:,.1f}", f"{row['speedup']:.2f}", f"{macs / row['macs']:.2f}")
        for row in figures["rows"]
    ]  # fmt: skip
    print(f"\n{markdown_table(header, rows)}\n\n{environment_line(figures['environment'])}")


def draw(figures: dict, path: Path) -> None:
    """Top-1 against speed, a line for each model, r beside each point."""
    figure = Figure(figsize=(7.5, 4.6), layout="constrained")
    axes = figure.subplots()
    for index, name in enumerate(dict.fromkeys(row["model"] for row in figures["rows"])):
        rows = [row for row in figures["rows"] if row["model"] == name]
        points = [(row["speedup"], 100 * row["top1"]) for row in rows]
        axes.plot(*zip(*points, strict=True), "o-" if len(rows) > 1 else "*", label=name)
        for row, point in zip(rows, points, strict=True):
            below_or_above = (4, (5, -10, 14)[index % 3])  # lines may run close to each other
            axes.annotate(f"r = {row['r']}", point, xytext=below_or_above, textcoords="offset points", fontsize=7)
    environment, first = figures["environment"], figures["rows"][0]
    speed = f"{first['model']}, r = {first['r']}: {first['images_per_second']:,.0f} images/s"
    axes.set(xlabel=f"times as fast as {speed}", ylabel="top-1 (%)")
    setting = f"{environment['dtype']}, batch {environment['batch']}; {environment['hardware']}; {environment['date']}"
    axes.set_title(f"r tokens merge in each block that keeps attention; {setting}", fontsize=8)
    axes.margins(0.1)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
