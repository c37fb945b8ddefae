"""The folder a training writes to: whether it may be used, what a run can go on from, and the base model in it."""

import logging
import shutil
from dataclasses import dataclass
from pathlib import Path

from accelerate import PartialState

from .arguments import LambdaTrainingArguments
from .checkpoints import find_resumable_checkpoint, num_processes_of, what_is_broken


logger = logging.getLogger(__name__)


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
                shutil.rmtree(checkpoint)
            self.base_training.rename(self.base)
        PartialState().wait_for_everyone()

    def bring_base(self) -> None:
        """Copies the base model of a run resumed from another folder, so that this folder can be resumed too."""
        if PartialState().is_main_process and self.source != self.path and self.base.is_dir():
            shutil.copytree(self.base, self.path / "base", dirs_exist_ok=True)
        PartialState().wait_for_everyone()

    def clear(self) -> None:
        """Deletes what an earlier run would be resumed from, once nothing else can go wrong before training."""
        if PartialState().is_main_process:
            for old in [*self.path.glob("checkpoint-*"), self.base, self.base_training]:
                shutil.rmtree(old, ignore_errors=True)
        PartialState().wait_for_everyone()


def open_output_folder(training_args: LambdaTrainingArguments) -> OutputFolder:
    """
    Check the output folder before anything is written to it, and find what to resume from.

    Raises:
        FileExistsError: if it is a file, or not empty and neither overwriting nor resuming was asked for.
        ValueError: if the checkpoint named cannot be resumed.
    """
    path = Path(training_args.output_dir)
    if path.exists() and not path.is_dir():
        raise FileExistsError(f"The output folder {path} is a file.")
    requested = str(training_args.resume_from_checkpoint or "false")
    if requested.lower() == "false":
        if path.is_dir() and any(path.iterdir()) and not training_args.overwrite_output_dir:
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
