"""The inference benchmark: how fast, how large and how alike several models are, measured in one run."""

import statistics
import time
from collections.abc import Sequence

import torch
from tqdm.auto import tqdm

from ..evaluation.throughput import describe_environment, interleave, markdown_table, percentile, speedup
from .peak_memory import peak_memory_cpu, peak_memory_cuda
from .variants import BenchmarkSetup, Variant, build_variant, image_shape, like_for_like, parse_variant


TOLERANCE = 1e-3


@torch.inference_mode()
def measure_inference(
    names: Sequence[str],
    setup: BenchmarkSetup,
    batch_sizes: Sequence[int] = (1, 8),
    max_rounds: int = 30,
    max_seconds: float = 200.0,
    with_memory: bool = True,
    labelled: tuple[torch.Tensor, torch.Tensor] | None = None,
    disable_tqdm: bool = False,
) -> dict:
    """
    Build the models, compare their outputs, and time them in turns.

    Args:
        names (`Sequence[str]`): the models (see [`build_variant`]). Speed-ups are against the first, and against
            `transformers` in the same engine and precision, where it takes part.
        setup ([`BenchmarkSetup`]): what they have in common.
        batch_sizes (`Sequence[int]`, *optional*, defaults to `(1, 8)`): each is timed by itself.
        max_rounds (`int`, *optional*, defaults to 30): timed rounds per batch size, after one to warm up.
        max_seconds (`float`, *optional*, defaults to 200):
            From the start; no new round after it, but 3 in any case. Peak memory takes half of it at most.
        with_memory (`bool`, *optional*, defaults to `True`): measure peak memory at the largest batch size.
        labelled (`tuple` of images and labels, *optional*): to measure top-1 on.
        disable_tqdm (`bool`, *optional*, defaults to `False`): no progress bars.

    Returns:
        `dict`: `rows`, one per model and batch size; `notes`; `environment`; JSON-serialisable.

    Raises:
        ValueError: on a name that makes no sense; if the labelled images are of another size than those that models
            are timed on; or if two fp32 models that should agree differ in a logit by more than 1e-3.
    """
    for name in names:
        parse_variant(name, setup.dtype)  # a name that makes no sense is refused before any model is built
    if labelled is not None:
        found, expected = tuple(labelled[0].shape[1:]), image_shape(setup.base_model.config)
        if found != expected:
            raise ValueError(
                f"The labelled images are of {found}, but the model's config says {expected}, and speed is measured at"
                " that: load the model with `image_size=` of its image processor, save both, and take these."
            )
    begin = time.perf_counter()
    deadline = begin + max_seconds
    with tqdm(names, desc="building models", leave=False, disable=disable_tqdm) as bar:
        variants = [build_variant(name, setup) for name in bar]
    differences = _compare_outputs(variants)
    peaks, notes = {}, []
    if with_memory:
        half = begin + max_seconds / 2
        peaks, notes = _peak_memory(variants, setup, max(batch_sizes), half, disable_tqdm)
    accuracies = {key(one): _accuracy(one, *labelled) for one in variants} if labelled else {}
    rows = []
    for index, batch_size in enumerate(sorted(batch_sizes)):
        share = (deadline - time.perf_counter()) / (len(batch_sizes) - index)
        seconds = _time(variants, batch_size, setup.device, max_rounds, share, disable_tqdm)
        for variant in variants:
            rows.append(
                {
                    "model": variant.name,
                    "precision": variant.precision,
                    "device": variant.device,
                    "batch_size": batch_size,
                    **_figures(variant, variants, seconds, batch_size),
                    "parameters": variant.parameters,
                    "macs": variant.macs,
                    "weights_mb": variant.weights_bytes / 1e6,
                    "peak_memory_mb": peaks.get(key(variant)) if batch_size == max(batch_sizes) else None,
                    "max_difference": differences.get(key(variant)),
                    "accuracy": accuracies.get(key(variant)),
                }
            )
    return {"rows": rows, "notes": notes, "environment": describe_environment(setup.device)}


def key(variant: Variant) -> str:
    """What tells a variant from all others."""
    return f"{variant.name} {variant.precision}"


def _time(variants, batch_size: int, device: str, max_rounds: int, max_seconds: float, disable_tqdm: bool) -> dict:
    runs = {}
    for variant in variants:
        images = variant.images(batch_size)
        runs[key(variant)] = lambda run=variant.run, images=images: run(images)
    with tqdm(total=max_rounds + 1, desc=f"rounds of batch {batch_size}", leave=False, disable=disable_tqdm) as bar:
        return interleave(
            runs, max_rounds, warm_up=1, device=device, max_seconds=max_seconds, after_round=bar.update
        )  # fmt: skip


def _figures(variant: Variant, variants: list[Variant], seconds: dict, batch_size: int) -> dict:
    times, partner = seconds[key(variant)], like_for_like(variant.name)
    plain = [one for one in variants if one.name == partner and one.precision == variant.precision]
    median = statistics.median(times)
    return {
        "images_per_second": batch_size / median,
        "latency_ms": {"median": 1000 * median, "p95": 1000 * percentile(times, 0.95)},
        "speedup": speedup(seconds[key(variants[0])], times),
        "speedup_like_for_like": speedup(seconds[key(plain[0])], times) if plain else None,
        "rounds": len(times),
    }


def _compare_outputs(variants: list[Variant]) -> dict[str, float]:
    """Largest difference of a logit between models that should agree: against the first of them, in fp32 if any is."""
    outputs = {key(one): one.run(one.images(2)).float().cpu() for one in variants}
    references: dict[str, torch.Tensor] = {}
    for one in sorted(variants, key=lambda one: one.precision != "fp32"):
        if one.function:
            references.setdefault(one.function, outputs[key(one)])
    differences = {}
    for one in variants:
        if one.function not in references:
            continue
        difference = (outputs[key(one)] - references[one.function]).abs().max().item()
        differences[key(one)] = difference
        if one.precision == "fp32" and one.device == "cpu" and not difference <= TOLERANCE:
            raise ValueError(f"{key(one)} is not the function it should be: a logit differs by {difference:.2g}.")
    return differences


def _peak_memory(
    variants, setup: BenchmarkSetup, batch_size: int, deadline: float, disable_tqdm: bool
) -> tuple[dict, list[str]]:
    """Peak memory in MB by variant, and notes on what was left out: none begins after the deadline."""
    if setup.device != "cpu":
        on_device = [one for one in variants if one.device == setup.device]
        return {key(one): peak_memory_cuda(one, batch_size) / 1e6 for one in on_device}, []
    bar = tqdm(total=len(variants), desc="peak memory", leave=False, disable=disable_tqdm)
    peaks = {}
    try:
        for one, peak in zip(variants, peak_memory_cpu(variants, setup, batch_size), strict=True):
            peaks[key(one)] = peak and peak / 1e6
            bar.update()
            if time.perf_counter() > deadline and len(peaks) < len(variants):
                return peaks, [f"Peak memory of {len(variants) - len(peaks)} models was left out to save time."]
    except OSError as error:
        return {}, [f"No peak memory: {error}"]
    finally:
        bar.close()
    return peaks, []


def _accuracy(variant: Variant, images: torch.Tensor, labels: torch.Tensor) -> float:
    batches = images.to(variant.device, variant.dtype).split(64)
    predictions = torch.cat([variant.run(batch).argmax(dim=1).cpu() for batch in batches])
    return (predictions == labels).double().mean().item()


def inference_table(result: dict) -> str:
    """The rows of [`measure_inference`] in Markdown; columns without any value are left out."""
    rows = result["rows"]
    columns = {
        "model": lambda row: f"`{row['model']}`",
        "precision": lambda row: row["precision"],
        "batch": lambda row: row["batch_size"],
        "images/s": lambda row: f"{row['images_per_second']:,.1f}",
        "ms, median": lambda row: f"{row['latency_ms']['median']:,.1f}",
        "ms, p95": lambda row: f"{row['latency_ms']['p95']:,.1f}",
        "x first": lambda row: f"{row['speedup']:.2f}",
        "x transformers, same engine and precision": lambda row: _shown(row.get("speedup_like_for_like"), "{:.2f}"),
        "peak MB": lambda row: _shown(row["peak_memory_mb"], "{:,.0f}"),
        "parameters (M)": lambda row: _shown(row["parameters"], "{:.2f}", 1e6),
        "GMACs": lambda row: _shown(row["macs"], "{:.2f}", 1e9),
        "weights (MB)": lambda row: f"{row['weights_mb']:,.1f}",
        "logits differ by": lambda row: _shown(row["max_difference"], "{:.0e}"),
        "top-1 (%)": lambda row: _shown(row["accuracy"], "{:.2f}", 0.01),
    }
    cells = {name: [show(row) for row in rows] for name, show in columns.items()}
    cells = {name: values for name, values in cells.items() if any(value is not None for value in values)}
    return markdown_table(list(cells), list(zip(*cells.values(), strict=True)))


def _shown(value: float | None, form: str, unit: float = 1.0) -> str | None:
    return None if value is None else form.format(value / unit)
