"""Which checkpoint of an interrupted run can be resumed.

The Trainer writes straight into `checkpoint-N`, so a run killed in the middle of saving leaves a folder that looks
like the newest checkpoint but is not whole (https://github.com/huggingface/transformers/issues/35782).
"""

import json
import logging
import re
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open

from ..models.checksums import MANIFEST, find_damage
from ..models.weight_files import damage_of_archive


logger = logging.getLogger(__name__)

EMA_FILE = "ema.safetensors"  # of EmaCallback, beside the weights
# What resuming reads, besides the model.
RESUMED_FILES = ("trainer_state.json", "optimizer.pt", "scheduler.pt", "scaler.pt", "rng_state*.pth")
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
_TORCH_FILES = ("optimizer.pt", "scheduler.pt", "rng_state*.pth")


def what_is_broken(checkpoint: str | Path, needed: tuple[str, ...] = ()) -> str | None:
    """
    Why a Trainer checkpoint cannot be resumed exactly, in a few words; `None` if it is whole. One of a run with
    [`EmaCallback`] is whole only with the average of the weights. Every file is compared with the checkpoint's
    `SHA256SUMS`; without one, what torch wrote with the checksums inside.

    Args:
        checkpoint (`str` or `Path`): the folder `checkpoint-N`.
        needed (`tuple[str]`, *optional*): more safetensors files that it must have.
    """
    checkpoint = Path(checkpoint)
    try:
        # Written last: a checkpoint without it was interrupted.
        state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
        json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        return f"no {Path(error.filename).name}"
    except (ValueError, RecursionError):
        return "trainer_state.json or config.json is cut short or damaged"
    if not _is_state(state):
        return "trainer_state.json or config.json is cut short or damaged"
    averages = "EmaCallback" in (state.get("stateful_callbacks") or {})
    if (checkpoint / EMA_FILE).is_file() and not averages:
        return f"trainer_state.json is damaged: it knows nothing of {EMA_FILE}"
    needed = {*needed, *([EMA_FILE] if averages else [])}
    index = checkpoint / "model.safetensors.index.json"
    if index.is_file():
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    else:
        names = {path.name for path in checkpoint.glob("model*.safetensors")}
    if not names:
        return "no weights"
    missing = [name for name in sorted(needed) if not (checkpoint / name).is_file()]
    if missing:
        return f"no {missing[0]}"
    names.update(needed)
    for path in (checkpoint / name for name in sorted(names)):
        try:
            with safe_open(path, framework="pt"):
                pass
        except (SafetensorError, OSError):
            return f"{path.name} is cut short"
    is_listed = (checkpoint / MANIFEST).is_file()
    for pattern in _TORCH_FILES:
        files = sorted(checkpoint.glob(pattern))
        if not files:
            return f"no {pattern}"
        for path in files:
            # torch writes zip archives, with the directory at the end.
            if not zipfile.is_zipfile(path):
                return f"{path.name} is cut short"
            damage = None if is_listed else damage_of_archive(path)
            if damage:
                return f"{path.name} is damaged: {damage}"
    return find_damage(checkpoint)


def find_resumable_checkpoint(output_dir: str | Path, needed: tuple[str, ...] = ()) -> Path | None:
    """
    The newest whole checkpoint in a Trainer's output folder; every newer one that is not whole is logged as a warning.

    Args:
        output_dir (`str` or `Path`): the folder with `checkpoint-N` folders.
        needed (`tuple[str]`, *optional*): as in [`what_is_broken`].

    Returns:
        The checkpoint's path, or `None` if there is none.
    """
    folders = [
        path for path in Path(output_dir).glob("checkpoint-*") if path.is_dir() and _CHECKPOINT.fullmatch(path.name)
    ]
    for checkpoint in sorted(folders, key=lambda path: int(_CHECKPOINT.fullmatch(path.name)[1]), reverse=True):
        problem = what_is_broken(checkpoint, needed)
        if problem is None:
            return checkpoint
        logger.warning("Passing over %s: %s.", checkpoint, problem)
    return None


@contextmanager
def damage_named(what: str) -> Iterator[None]:
    """
    For reading JSON that may be anything: whatever a damaged value leads to is one error that names the file.

    Raises:
        OSError: with `what` is damaged, and why.
    """
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        raise OSError(f"{what} is damaged ({type(error).__name__}: {error}). Take another checkpoint.") from error


def _is_state(state) -> bool:
    """Whether the Trainer, and its callbacks, can start to read it."""
    if not isinstance(state, dict):
        return False
    history, callbacks = state.get("log_history"), state.get("stateful_callbacks")
    return (
        all(type(state.get(name, 0)) is int and state.get(name, 0) >= 0 for name in ("global_step", "max_steps"))
        and isinstance(history or [], list)
        and all(isinstance(entry, dict) for entry in history or [])
        and isinstance(callbacks or {}, dict)
        and all(isinstance(one, (dict, list)) for one in (callbacks or {}).values())
    )


def num_processes_of(checkpoint: str | Path) -> int:
    """How many processes wrote a Trainer checkpoint: each leaves the state of its random numbers."""
    return max(1, len(list(Path(checkpoint).glob("rng_state_*.pth"))))
