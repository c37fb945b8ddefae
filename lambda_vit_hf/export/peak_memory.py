"""How much memory a model needs to classify a batch."""

import gc
import multiprocessing
from collections.abc import Iterator
from pathlib import Path

import torch

from .contenders import Contender, Contest, build_contender


def peak_memory_cuda(contender: Contender, batch_size: int) -> int:
    """Peak of PyTorch's allocations during inference, in bytes: the contender's weights and what the batch needs."""
    images = contender.images(batch_size)
    device = images.device
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    with torch.inference_mode():
        contender.run(images)
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before + contender.weights_bytes


def peak_memory_cpu(contenders: list[Contender], contest: Contest, batch_size: int) -> Iterator[int | None]:
    """
    Peak resident memory during inference on the CPU, in bytes, beyond that of a process with the libraries loaded:
    weights, activations, and what the engine keeps. Each contender is built again in a process of its own.

    Yields:
        `int`, in the order of `contenders`; `None` where a compiler shares the process: its memory would count too.

    Raises:
        OSError: where there is no `/proc` to read it from.
        RuntimeError: if a process fails; its own message is on the terminal.
    """
    if not Path("/proc/self/clear_refs").exists():
        raise OSError("The peak of a process is read from /proc, which only Linux has.")
    # Libraries are loaded once; each process is a fork of one that has done nothing else yet.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "timm.models.vision_transformer", "onnxruntime"])
    settings = {name: getattr(contest, name) for name in contest.__dataclass_fields__}
    for contender in contenders:
        if {"exported", "compiled"} & set(contender.name.split("+")):
            yield None
            continue
        name = str(contender.file or f"{contender.name}+{contender.precision}")
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


def _measure(sender, name: str, contest: dict, batch_size: int, threads: int) -> None:
    torch.set_num_threads(threads)
    gc.collect()
    loaded = _memory("VmRSS")
    contender = build_contender(name, Contest(**contest))
    images = contender.images(batch_size)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # sets the peak back to what is resident now
    with torch.inference_mode():
        contender.run(images)
    sender.send(_memory("VmHWM") - loaded)


def _memory(field: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))
