"""The folder a training writes to: whether it may be used, what a run can go on from, and the base model in it."""

import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from accelerate import PartialState
from filelock import SoftFileLock, Timeout

from .arguments import LambdaTrainingArguments
from .checkpoints import find_resumable_checkpoint, num_processes_of, what_is_broken


logger = logging.getLogger(__name__)

LOCK = ".lock"


@dataclass
class OutputFolder:
    """
    Where a run keeps its things, and what it goes on from.

    Attributes:
        path (`Path`): for the finished model.
        checkpoint (`Path`, *optional*): of the removal phase, to resume from.
        base_checkpoint (`Path`, *optional*): of the base model's training, to resume from.
        resuming (`bool`): whether resuming was asked for.
        source (`Path`): folder of the run that is resumed; `path` itself, unless a checkpoint elsewhere is named.
    """

    path: Path
    checkpoint: Path | None = None
    base_checkpoint: Path | None = None
    resuming: bool = False

    @property
    def is_resumed(self) -> bool:
        """Whether there is anything to go on from."""
        return self.resuming and (self.source_checkpoint is not None or self.base.is_dir())

    @property
    def source_checkpoint(self) -> Path | None:
        """Of the removal phase, or else of the base model's training."""
        return self.checkpoint or self.base_checkpoint

    @property
    def source(self) -> Path:
        return self.checkpoint.parent if self.checkpoint else self.path

    @property
    def base(self) -> Path:
        """The base model that a run trained itself. There is one only once it is whole."""
        return self.source / "base"

    @property
    def base_training(self) -> Path:
        """Checkpoints of the base model's training; gone once it is finished."""
        return self.path / "base-training"

    def keep_base(self) -> None:
        """Moves the finished base model out of the folder of its training, on the main process."""
        if PartialState().is_main_process:
            for checkpoint in self.base_training.glob("checkpoint-*"):
                _delete(checkpoint)
            self.base_training.rename(self.base)
        PartialState().wait_for_everyone()

    def bring_base(self) -> None:
        """Copies the base model of a run resumed from another folder, so that this folder can be resumed too."""
        if PartialState().is_main_process and self.source != self.path and self.base.is_dir():
            half, whole = self.path / "base.part", self.path / "base"
            shutil.rmtree(half, ignore_errors=True)  # of a run that was killed here
            shutil.copytree(self.base, half)
            _delete(whole)
            half.rename(whole)
        PartialState().wait_for_everyone()

    def clear(self) -> None:
        """Deletes what an earlier run would be resumed from, once nothing else can go wrong before training."""
        if PartialState().is_main_process:
            for old in [*self.path.glob("checkpoint-*"), self.base, self.base_training]:
                _delete(old)
        PartialState().wait_for_everyone()


def open_output_folder(training_args: LambdaTrainingArguments) -> OutputFolder:
    """
    Check the output folder before anything is written to it, and find what to resume from.

    Raises:
        FileExistsError: if it is a file, or not empty and neither overwriting nor resuming was asked for.
        ValueError: if the checkpoint named cannot be resumed.
    """
    path = Path(training_args.output_dir)
    _check_no_file(path)
    requested = str(training_args.resume_from_checkpoint or "false")
    if requested.lower() == "false":
        is_used = path.is_dir() and any(one.name != LOCK for one in path.iterdir())
        if is_used and not training_args.overwrite_output_dir:
            raise FileExistsError(
                f"The output folder {path} is not empty. Pass --overwrite_output_dir to start anew in it,"
                " --resume_from_checkpoint true to go on with an interrupted run, or another --output_dir."
            )
        return OutputFolder(path)
    if requested.lower() != "true":
        problem = what_is_broken(requested)
        if problem:
            raise ValueError(f"Cannot resume from {requested}: {problem}.")
        if Path(requested).resolve().parent.name == "base-training":
            raise ValueError(
                f"{requested} is a checkpoint of the base model's training: use --resume_from_checkpoint true."
            )
        folder = OutputFolder(path, checkpoint=Path(requested), resuming=True)
        others = [one for one in path.glob("checkpoint-*") if one.parent.resolve() != Path(requested).resolve().parent]
        if others:
            raise FileExistsError(f"The output folder {path} holds checkpoints of another run: {others[0].name}.")
    else:
        folder = OutputFolder(path, checkpoint=find_resumable_checkpoint(path), resuming=True)
        if folder.checkpoint is None and not folder.base.is_dir():
            folder.base_checkpoint = find_resumable_checkpoint(folder.base_training)
    if folder.source_checkpoint is not None:
        _compare_processes(folder.source_checkpoint, training_args.world_size)
    elif folder.base.is_dir():
        logger.warning("The base model in %s is whole; going on with the removal.", folder.base)
    else:
        logger.warning("No whole checkpoint in %s; starting from the beginning.", path)
    return folder


@contextmanager
def hold_output_folder(path: str | Path) -> Iterator[None]:
    """
    Keeps other runs out of an output folder, by a file `.lock` with the host and the id of the main process. That of
    a process of this host which is gone does not count.

    Raises:
        FileExistsError: if it is a file, or another run writes there, naming host and process.
    """
    if not PartialState().is_main_process:
        yield
        return
    path = Path(path)
    _check_no_file(path)
    is_new = not path.is_dir()
    path.mkdir(parents=True, exist_ok=True)
    lock = SoftFileLock(path / LOCK, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        pid, host = _holder(path / LOCK)
        raise FileExistsError(
            f"Another run writes to {path}: process {pid} on host {host}. Wait for it, or take another --output_dir."
            f" If it is gone with its host, delete {path / LOCK}."
        ) from None
    try:
        yield
    finally:
        lock.release()
        if is_new and not any(path.iterdir()):
            path.rmdir()  # nothing came of it


def _holder(lock: Path) -> list[str]:
    """Process and host, `?` where the file does not say, or has just gone."""
    try:
        lines = lock.read_text(encoding="utf-8", errors="replace")[:300].splitlines()
    except FileNotFoundError:
        lines = []
    return [*lines, "?", "?"][:2]


def _check_no_file(path: Path) -> None:
    if path.exists() and not path.is_dir():
        raise FileExistsError(f"The output folder {path} is a file.")


def _delete(folder: Path) -> None:
    """At once, for whoever looks: a kill in the middle leaves no half folder under its name."""
    if folder.is_dir():
        doomed = folder.with_name(f".deleting-{folder.name}")
        shutil.rmtree(doomed, ignore_errors=True)
        folder.rename(doomed)
        shutil.rmtree(doomed)


def _compare_processes(checkpoint: Path, world_size: int) -> None:
    before = num_processes_of(checkpoint)
    if before != world_size:
        logger.warning(
            "%s was written by %d processes, this run has %d: weights, optimizer, learning rate and lambda go on where"
            " they were; images come in another order from here, and dropout draws anew.",
            checkpoint,
            before,
            world_size,
        )
