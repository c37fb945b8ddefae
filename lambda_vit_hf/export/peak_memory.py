"""How much memory a model needs to classify a batch."""

import gc
import multiprocessing
from collections.abc import Iterator
from pathlib import Path

import torch

from .variants import BenchmarkSetup, Variant, build_variant


def peak_memory_cuda(variant: Variant, batch_size: int) -> int:
    """Peak of PyTorch's allocations during inference, in bytes: the variant's weights and what the batch needs."""
    images = variant.images(batch_size)
    device = images.device
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    with torch.inference_mode():
        variant.run(images)
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before + variant.weights_bytes


def peak_memory_cpu(variants: list[Variant], setup: BenchmarkSetup, batch_size: int) -> Iterator[int | None]:
    """
    Peak resident memory during inference on the CPU, in bytes, beyond that of a process with the libraries loaded:
    weights, activations, and what the engine keeps. Each variant is built again in a process of its own.

    Yields:
        `int`, in the order of `variants`; `None` where a compiler shares the process: its memory would count too.

    Raises:
        OSError: where there is no `/proc` to read it from.
        RuntimeError: if a process fails; its own message is on the terminal.
    """
    if not Path("/proc/self/clear_refs").exists():
        raise OSError("The peak of a process is read from /proc, which only Linux has.")
    # Libraries are loaded once; each process is a fork of one that has done nothing else yet.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "timm.models.vision_transformer", "onnxruntime"])
    settings = {name: getattr(setup, name) for name in setup.__dataclass_fields__}
    for variant in variants:
        if {"exported", "compiled"} & set(variant.name.split("+")):
            yield None
            continue
        name = str(variant.file or f"{variant.name}+{variant.precision}")
        receiver, sender = context.Pipe(duplex=False)
        arguments = (sender, name, settings, batch_size, torch.get_num_threads())
        process = context.Process(target=_measure, args=arguments)
        process.start()
        sender.close()
        try:
            yield receiver.recv()
        except EOFError:
            raise RuntimeError(f"The process that measures the memory of {name} failed.") from None
        finally:
            process.join()


def _measure(sender, name: str, setup: dict, batch_size: int, threads: int) -> None:
    torch.set_num_threads(threads)
    gc.collect()
    loaded = _memory("VmRSS")
    variant = build_variant(name, BenchmarkSetup(**setup))
    images = variant.images(batch_size)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # sets the peak back to what is resident now
    with torch.inference_mode():
        variant.run(images)
    sender.send(_memory("VmHWM") - loaded)


def _memory(field: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))
