"""Speed, measured side by side: interleaved runs in one process, medians, and what it was measured on."""

import math
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from importlib.metadata import version

import torch


def describe_environment(device: torch.device | str = "cpu") -> dict[str, str]:
    """Hardware, threads, versions and date of figures measured on `device`: what belongs beside each of them."""
    if torch.device(device).type == "cuda":
        hardware = torch.cuda.get_device_name(device)
    else:
        hardware = f"{_processor_name()}, threads: {torch.get_num_threads()}"
    packages = ("torch", "transformers")
    return {"hardware": hardware, "date": date.today().isoformat(), **{name: version(name) for name in packages}}


def _processor_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as cpuinfo:
            names = [line.split(":", 1)[1].strip() for line in cpuinfo if line.startswith("model name")]
        if names:
            return names[0]
    except OSError:
        pass  # no such file outside Linux
    return platform.processor() or platform.machine()


def interleave(
    runs: Mapping[str, Callable[[], object]],
    rounds: int,
    warm_up: int = 3,
    device: torch.device | str = "cpu",
    max_seconds: float = math.inf,
    min_rounds: int = 3,
    after_round: Callable[[], object] | None = None,
) -> dict[str, list[float]]:
    """
    Time several things in turns (A B A B ...), so that a noisy minute of the machine hits all alike.

    Args:
        runs (`Mapping[str, Callable[[], object]]`): what to time, by name; called without arguments.
        rounds (`int`): timed rounds; in each, every run has one turn.
        warm_up (`int`, *optional*, defaults to 3): rounds before, not timed.
        device (`torch.device` or `str`, *optional*, defaults to `"cpu"`): waited for before and after each turn.
        max_seconds (`float`, *optional*):
            No further round starts after this time, and warming up takes half of it, but
        min_rounds (`int`, *optional*, defaults to 3): timed rounds are run in any case.
        after_round (`Callable`, *optional*): called after each round, outside all times; to show progress.

    Returns:
        `dict[str, list[float]]`: seconds of each turn; entry `i` of all lists is of the same round.
    """
    device = torch.device(device)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    begin = time.perf_counter()
    done = 0
    for round_index in range(rounds + warm_up):
        elapsed = time.perf_counter() - begin
        if done == rounds or (done >= min_rounds and elapsed > max_seconds):
            break
        is_timed = round_index >= warm_up or elapsed > max_seconds / 2
        done += is_timed
        for name, run in runs.items():
            _synchronize(device)
            start = time.perf_counter()
            run()
            _synchronize(device)
            if is_timed:
                seconds[name].append(time.perf_counter() - start)
        if after_round is not None:
            after_round()
    return seconds


def speedup(reference: Sequence[float], measured: Sequence[float]) -> float:
    """
    How many times faster `measured` is than `reference`: the median of the ratios round by round.

    Both turns of a round meet the same state of the machine, so their ratio is steadier than the ratio of medians.

    Raises:
        ValueError: if the two were not timed in the same number of rounds.
    """
    return statistics.median(before / after for before, after in zip(reference, measured, strict=True))


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest of `values` that at least `share` (in (0, 1]) of them do not exceed (nearest rank)."""
    return sorted(values)[max(math.ceil(share * len(values)) - 1, 0)]


@torch.inference_mode()
def images_per_second(
    models: dict[str, torch.nn.Module], pixel_values: torch.Tensor, rounds: int = 15, max_seconds: float = 60.0
) -> dict:
    """
    Throughput of several models, interleaved (see [`interleave`]).

    Args:
        models (`dict[str, torch.nn.Module]`): by name, all on the device of `pixel_values`.
        pixel_values (`torch.Tensor` of shape `(batch, channels, height, width)`): the batch each round runs on.
        rounds (`int`, *optional*, defaults to 15): timed rounds, after 3 to warm up.
        max_seconds (`float`, *optional*, defaults to 60):
            No further round starts after this time; large models on a CPU are then timed once, after one to warm up.

    Returns:
        `dict[str, float]`: median images/s by name.
    """
    was_training = {name: model.training for name, model in models.items()}
    for model in models.values():
        model.eval()
    runs = {name: lambda model=model: model(pixel_values) for name, model in models.items()}
    try:
        seconds = interleave(runs, rounds, device=pixel_values.device, max_seconds=max_seconds, min_rounds=1)
    finally:
        for name, model in models.items():
            model.train(was_training[name])
    return {name: len(pixel_values) / statistics.median(times) for name, times in seconds.items()}


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table; `None` becomes an empty cell, and names with `|` or line breaks stay in theirs."""
    lines = [
        [_cell(name) for name in header],
        ["---"] * len(header),
        *([_cell(value) for value in row] for row in rows),
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(value: object) -> str:
    return "" if value is None else " ".join(str(value).splitlines()).replace("|", r"\|")


def environment_line(environment: Mapping[str, object]) -> str:
    """One line for below a table: `(AMD EPYC, threads: 2; torch 2.15.0; ...; 2026-11-22)`."""
    known = {"hardware": "{}", "date": "{}"}
    return f"({'; '.join(known.get(name, f'{name} {{}}').format(value) for name, value in environment.items())})"


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
