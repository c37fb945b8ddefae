"""Speed, measured side by side: interleaved runs in one process, medians, and what it was measured on."""

import platform
import statistics
import time
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


@torch.inference_mode()
def images_per_second(models: dict[str, torch.nn.Module], pixel_values: torch.Tensor, rounds: int = 15) -> dict:
    """
    Throughput of several models, interleaved (A B A B ...), so that a noisy machine hits all alike.

    Args:
        models (`dict[str, torch.nn.Module]`): by name, all on the device of `pixel_values`.
        pixel_values (`torch.Tensor` of shape `(batch, channels, height, width)`): the batch each round runs on.
        rounds (`int`, *optional*, defaults to 15): timed rounds, after 3 to warm up.

    Returns:
        `dict[str, float]`: median images/s by name.
    """
    was_training = {name: model.training for name, model in models.items()}
    for model in models.values():
        model.eval()
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for round_index in range(rounds + 3):
        for name, model in models.items():
            _synchronize(pixel_values.device)
            start = time.perf_counter()
            model(pixel_values)
            _synchronize(pixel_values.device)
            if round_index >= 3:
                seconds[name].append(time.perf_counter() - start)
    for name, model in models.items():
        model.train(was_training[name])
    return {name: len(pixel_values) / statistics.median(times) for name, times in seconds.items()}


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
