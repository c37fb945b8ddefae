"""What removing attention gains by resolution: measured, beside what arithmetic promises. JSON, Markdown, a picture.

    python -m benchmarks.resolution_speed --output_dir outputs/resolution
    python -m benchmarks.resolution_speed --models dinov2_small --image_sizes 768 1022 --batch_size 1
    python -m benchmarks.resolution_speed --peak_memory --output_dir outputs/memory
    python -m benchmarks.resolution_speed --show results/resolution_*.json

Attention's share of the work grows with the square of the tokens, so removal gains more on large images. Each model
is compared with transformers' own, whole, in the same engine and precision: PyTorch, float32, sdpa. Weights are
random: speed does not depend on them. Removed layers are folded; `prepare_for_inference` is left out, so that the
gain is that of removal alone. Where a side is no multiple of the patch, the rest of the image is not seen.
`--peak_memory` measures memory instead, each model in a process of its own.
"""

import functools
import json
import statistics
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import nn
from tqdm.auto import tqdm
from transformers import AutoModelForImageClassification, Dinov2Config, PreTrainedConfig, ViTConfig

from lambda_vit_hf import LambdaDinov2Config, LambdaViTConfig
from lambda_vit_hf.cli.benchmark import write_result
from lambda_vit_hf.cli.runner import run_program
from lambda_vit_hf.evaluation.accounting import count_macs
from lambda_vit_hf.evaluation.throughput import (
    describe_environment,
    environment_line,
    interleave,
    markdown_table,
    speedup,
)
from lambda_vit_hf.export.peak_memory import peak_memory_of_process


# transformers' configuration and this package's.
FAMILIES = {"vit": (ViTConfig, LambdaViTConfig), "dinov2": (Dinov2Config, LambdaDinov2Config)}
# Family and shape by name; what is not named is transformers' default, which is the base size.
MODELS = {
    "vit_base": ("vit", dict(patch_size=16)),
    "dinov2_small": ("dinov2", dict(patch_size=14, hidden_size=384, num_attention_heads=6)),
    "dinov2_base": ("dinov2", dict(patch_size=14)),
}
# The paper's for DeiT-B, of which the first so many are removed. Speed does not depend on which.
ORDER = (0, 1, 3, 4, 6, 9)


def build_model(family: str, shape: Mapping, image_size: int, number: int) -> nn.Module:
    """
    transformers' own model where no layer is removed, else this package's, folded. In eval mode.

    Raises:
        ValueError: if the model has no such layers.
    """
    config = FAMILIES[family][number > 0](**shape, image_size=image_size, num_labels=1000)
    model = AutoModelForImageClassification.from_config(config, attn_implementation="sdpa")
    if number:
        model.remove_attention(list(ORDER[:number]))
        model.fold_removed_attention()
    return model.eval()


def random_images(batch_size: int, image_size: int) -> torch.Tensor:
    """The same each time, `(batch, 3, height, width)`."""
    return torch.randn(batch_size, 3, image_size, image_size, generator=torch.Generator().manual_seed(0))


def count_tokens(config: PreTrainedConfig) -> int:
    """Patches that fit, and the class token."""
    return (config.image_size // config.patch_size) ** 2 + 1


@torch.inference_mode()
def measure_resolutions(
    models: Mapping[str, tuple[str, Mapping]],
    image_sizes: Sequence[int],
    numbers: Sequence[int] = (3, 5, 6),
    batch_size: int = 4,
    max_rounds: int = 20,
    max_seconds: float = 120.0,
    disable_tqdm: bool = False,
) -> dict:
    """
    Time whole and removed models in turns, at each image size.

    Args:
        models (`Mapping`): family (`"vit"` or `"dinov2"`) and shape by name.
        image_sizes (`Sequence[int]`): sides of square images, in pixels.
        numbers (`Sequence[int]`, *optional*, defaults to `(3, 5, 6)`): of removed layers; at most 6.
        batch_size (`int`, *optional*, defaults to 4): images per forward.
        max_rounds (`int`, *optional*, defaults to 20): timed rounds per model and size, after one to warm up.
        max_seconds (`float`, *optional*, defaults to 120): per model and size; 3 rounds are run in any case.
        disable_tqdm (`bool`, *optional*, defaults to `False`): no progress bar.

    Returns:
        `dict`: `rows`, one per model, size and number, 0 being the whole model: `gain` is the median of the ratios of
        times, taken round by round, `macs_gain` the ratio of multiply-accumulates; `environment`; JSON-serialisable.

    Raises:
        ValueError: if a number is not in 1 to 6.
    """
    _check_numbers(numbers)
    rows = []
    cases = [(name, size) for name in models for size in image_sizes]
    for name, image_size in tqdm(cases, desc="models and sizes", disable=disable_tqdm):
        built = {number: build_model(*models[name], image_size, number) for number in (0, *numbers)}
        images = random_images(batch_size, image_size)
        runs = {str(number): lambda model=model, images=images: model(images) for number, model in built.items()}
        seconds = interleave(runs, max_rounds, warm_up=1, max_seconds=max_seconds)
        macs = {number: count_macs(model.config) for number, model in built.items()}
        for number, model in built.items():
            times = seconds[str(number)]
            rows.append(
                {
                    "model": name,
                    "image_size": image_size,
                    "tokens": count_tokens(model.config),
                    "num_removed": number,
                    "images_per_second": batch_size / statistics.median(times),
                    "gain": speedup(seconds["0"], times),
                    "macs_gain": macs[0] / macs[number],
                    "macs": macs[number],
                    "rounds": len(times),
                }
            )
    environment = {**describe_environment(), "engine": "PyTorch fp32, sdpa", "batch": batch_size}
    return {"rows": rows, "environment": environment}


def measure_peak_memory(
    models: Mapping[str, tuple[str, Mapping]],
    image_sizes: Sequence[int],
    numbers: Sequence[int] = (3, 5, 6),
    batch_size: int = 4,
    disable_tqdm: bool = False,
) -> dict:
    """
    Peak memory of whole and removed models at each image size; arguments as of [`measure_resolutions`].

    Returns:
        `dict`: `rows`, one per model, size and number: `peak_bytes` of a process that classifies a batch, beyond its
        libraries, and `weights_bytes` of these; `environment`.

    Raises:
        ValueError: if a number is not in 1 to 6.
        OSError: where there is no `/proc` to read memory from.
    """
    _check_numbers(numbers)
    cases = [(name, size, number) for name in models for size in image_sizes for number in (0, *numbers)]
    rows = []
    for name, image_size, number in tqdm(cases, desc="processes", disable=disable_tqdm):
        with torch.device("meta"):
            model = build_model(*models[name], image_size, number)
        weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
        tokens = count_tokens(model.config)
        build = functools.partial(build_model_and_images, *models[name], image_size, number, batch_size)
        row = {"model": name, "image_size": image_size, "tokens": tokens, "num_removed": number}
        rows.append({**row, "peak_bytes": peak_memory_of_process(build, name), "weights_bytes": weights})
    environment = {**describe_environment(), "engine": "PyTorch fp32, sdpa", "batch": batch_size}
    return {"rows": rows, "environment": environment}


def _check_numbers(numbers: Sequence[int]) -> None:
    if not numbers or not all(1 <= number <= len(ORDER) for number in numbers):
        raise ValueError(f"Remove 1 to {len(ORDER)} layers, got {list(numbers)}.")


def build_model_and_images(
    family: str, shape: Mapping, image_size: int, number: int, batch_size: int
) -> tuple[nn.Module, torch.Tensor]:
    """What a process of [`measure_peak_memory`] runs."""
    return build_model(family, shape, image_size, number), random_images(batch_size, image_size)


def memory_table(result: dict) -> str:
    """The rows of [`measure_peak_memory`] in Markdown."""
    header = ("model", "pixels", "tokens", "removed", "peak (MB)", "of it weights (MB)")
    cells = [
        (row["model"], row["image_size"], row["tokens"], row["num_removed"], f"{row['peak_bytes'] / 1e6:,.0f}",
         f"{row['weights_bytes'] / 1e6:,.0f}")
        for row in result["rows"]
    ]  # fmt: skip
    return markdown_table(header, cells)


def table_of(result: dict) -> str:
    """Of either measurement."""
    return (memory_table if "peak_bytes" in result["rows"][0] else resolution_table)(result)


def resolution_table(result: dict) -> str:
    """The rows of [`measure_resolutions`] in Markdown."""
    header = ("model", "pixels", "tokens", "removed", "images/s", "gain", "by arithmetic", "gain of that (%)")
    cells = [
        (row["model"], row["image_size"], row["tokens"], row["num_removed"], f"{row['images_per_second']:,.2f}",
         f"{row['gain']:.2f}", f"{row['macs_gain']:.2f}", _share(row))
        for row in result["rows"]
    ]  # fmt: skip
    return markdown_table(header, cells)


def _share(row: dict) -> str | None:
    """The measured speed-up in percent of the arithmetic's; none for the whole model."""
    return f"{100 * row['gain'] / row['macs_gain']:.0f}" if row["num_removed"] else None


def plot_resolutions(result: dict, path: str | Path) -> None:
    """Gain against pixels, a panel for each model: measured as lines, by arithmetic dashed. PNG."""
    names = list(dict.fromkeys(row["model"] for row in result["rows"]))
    figure = Figure(figsize=(4.5 * len(names), 3.8), layout="constrained")
    for axis, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        removed = [row for row in result["rows"] if row["model"] == name and row["num_removed"]]
        for index, number in enumerate(sorted({row["num_removed"] for row in removed})):
            rows = sorted((row for row in removed if row["num_removed"] == number), key=lambda row: row["image_size"])
            pixels = [row["image_size"] for row in rows]
            measured, arithmetic = ([row[key] for row in rows] for key in ("gain", "macs_gain"))
            axis.plot(pixels, measured, "o-", color=f"C{index}", label=f"{number} removed, measured")
            axis.plot(pixels, arithmetic, "--", color=f"C{index}", label=f"{number} removed, by arithmetic")
        axis.set(title=name, xlabel="pixels a side", ylabel="times as fast as the whole model")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    environment = result["environment"]
    figure.suptitle(f"{environment['engine']}; {environment['hardware']}; {environment['date']}", fontsize=8)
    figure.savefig(path, dpi=120)


def parse_arguments(argv: Sequence[str] | None) -> Namespace:
    parser = ArgumentParser(
        "python -m benchmarks.resolution_speed", description=__doc__, formatter_class=RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--models", nargs="+", choices=list(MODELS), default=["vit_base", "dinov2_small"])
    add("--image_sizes", type=int, nargs="+", default=[98, 224, 384, 518])
    add("--num_removed", type=int, nargs="+", default=[3, 5, 6])
    add("--batch_size", type=int, default=4)
    add("--max_rounds", type=int, default=20)
    add("--max_seconds", type=float, default=120.0, help="per model and size (but 3 rounds in any case)")
    add("--peak_memory", action="store_true", help="measure memory (Linux), not speed")
    add("--output_dir", type=Path, default=Path("outputs/resolution"))
    add("--show", type=Path, nargs="+", help="only print the tables of figures written before (JSON)")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse_arguments(argv)
    for path in arguments.show or ():
        result = json.loads(path.read_text(encoding="utf-8"))
        print(f"{table_of(result)}\n\n{environment_line(result['environment'])}\n")
    if arguments.show:
        return
    models = {name: MODELS[name] for name in arguments.models}
    if arguments.peak_memory:
        result = measure_peak_memory(models, arguments.image_sizes, arguments.num_removed, arguments.batch_size)
        write_result("memory", result, memory_table(result), arguments.output_dir)
        return
    result = measure_resolutions(
        models, arguments.image_sizes, arguments.num_removed, arguments.batch_size, arguments.max_rounds,
        arguments.max_seconds,
    )  # fmt: skip
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    plot_resolutions(result, arguments.output_dir / "resolution.png")
    write_result("resolution", result, resolution_table(result), arguments.output_dir)


if __name__ == "__main__":
    run_program("benchmark", main)
