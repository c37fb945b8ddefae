"""How much memory a model needs to classify a batch."""

import ctypes
import functools
import gc
import multiprocessing
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from .variants import BenchmarkSetup, Variant, build_variant


# Loaded before any memory is measured. Transformers and this package load what they need only when it is asked for.
LIBRARIES = [
    "timm.models.vision_transformer",
    "onnxruntime",
    "transformers.models.vit.modeling_vit",
    "transformers.models.dinov2.modeling_dinov2",
    "lambda_vit_hf.models.families",
]


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
    [`peak_memory_of_process`] of each variant, built again.

    Yields:
        `int`, in the order of `variants`; `None` where a compiler shares the process: its memory would count too.

    Raises:
        OSError, RuntimeError: as `peak_memory_of_process`.
    """
    _require_proc()
    settings = {name: getattr(setup, name) for name in setup.__dataclass_fields__}
    for variant in variants:
        if {"exported", "compiled"} & set(variant.name.split("+")):
            yield None
            continue
        name = str(variant.file or f"{variant.name}+{variant.precision}")
        yield peak_memory_of_process(functools.partial(_build, name, settings, batch_size), name)


def peak_memory_of_process(build: Callable[[], tuple[Callable, torch.Tensor]], name: str) -> int:
    """
    Peak resident memory during one inference on the CPU, in bytes, beyond that of a process with the libraries loaded:
    weights, activations, and what the engine keeps.

    Args:
        build (`Callable`): run in a process of its own, so it has to pickle: gives a function of a batch, and a batch.
        name (`str`): for messages.

    Raises:
        OSError: where there is no `/proc` to read it from.
        RuntimeError: if the process fails; its own message is on the terminal.
    """
    _require_proc()
    # Libraries are loaded once; each process is a fork of one that has done nothing else yet.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, *LIBRARIES])
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_measure, args=(sender, build, torch.get_num_threads()))
    process.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        raise RuntimeError(f"The process that measures the memory of {name} failed.") from None
    finally:
        process.join()


def _require_proc() -> None:
    if not Path("/proc/self/clear_refs").exists():
        raise OSError("The peak of a process is read from /proc, which only Linux has.")


def _build(name: str, setup: dict, batch_size: int) -> tuple[Callable, torch.Tensor]:
    variant = build_variant(name, BenchmarkSetup(**setup))
    return variant.run, variant.images(batch_size)


def _measure(sender, build: Callable[[], tuple[Callable, torch.Tensor]], threads: int) -> None:
    torch.set_num_threads(threads)
    _give_back()
    loaded = _memory("VmRSS")
    run, images = build()
    _give_back()
    Path("/proc/self/clear_refs").write_text("5")  # sets the peak back to what is resident now
    with torch.inference_mode():
        run(images)
    sender.send(_memory("VmHWM") - loaded)


def _give_back() -> None:
    """Hand memory that was needed and freed, when weights were folded say, back to the system, where libc can."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _memory(field: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))
