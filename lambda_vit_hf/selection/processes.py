"""Several processes of torch's default group that select together: one answer for all, and no one is left waiting."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch.distributed as dist


class OtherProcessError(RuntimeError):
    """An error in another process; it names that process and its error."""


def rank_and_num_processes() -> tuple[int, int]:
    """`(0, 1)` without a process group."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def gather(value: Any) -> list:
    """
    `value` of every process, in rank order.

    Raises:
        OtherProcessError: if another process met an error inside [`fail_together`] instead.
    """
    return _exchange(value, error=None)


@contextlib.contextmanager
def fail_together() -> Iterator[None]:
    """
    An error inside, in one process, ends all of them: the others meet it in their next [`gather`], at the latest when
    they leave. Nothing inside may communicate in another way.

    Raises:
        OtherProcessError: in the processes without an error of their own.
    """
    try:
        yield
        gather(None)
    except OtherProcessError:
        raise
    except Exception as error:
        with contextlib.suppress(OtherProcessError):
            _exchange(None, f"{type(error).__name__}: {error}")
        raise


def _exchange(value: Any, error: str | None) -> list:
    own_rank, num_processes = rank_and_num_processes()
    if num_processes == 1:
        return [value]
    parts: list = [None] * num_processes
    dist.all_gather_object(parts, (value, error))
    for rank, (_, message) in enumerate(parts):
        if message is not None and rank != own_rank:
            raise OtherProcessError(f"Process {rank} failed: {message}")
    return [one for one, _ in parts]
