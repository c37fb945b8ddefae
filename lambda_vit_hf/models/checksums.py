"""`SHA256SUMS`, written last into a finished folder: a file that is damaged, swapped or gone is found by name.

The format is that of `sha256sum`, so that `sha256sum --check SHA256SUMS` reads it too. Folders without it are taken as
they are. Only the standard library: exported folders carry a copy.
"""

import hashlib
import os
import re
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path


MANIFEST = "SHA256SUMS"
# What is loaded, run or reported. Not the README and logs, which their readers may write on.
_LISTED_SUFFIXES = {".bin", ".json", ".onnx", ".png", ".pt", ".pt2", ".pth", ".py", ".safetensors"}
_LINE = re.compile(r"([0-9a-f]{64}) [ *]((?:onnx/)?[^/\\\n]+)")


def write_checksums(folder: str | Path) -> Path:
    """
    List the files at the top of a finished folder, and in its folder `onnx`, with their sha256, and return the list's
    path. It appears at once, whole, and after what it lists was sent to the disk (on POSIX systems).

    Args:
        folder (`str` or `Path`): of a checkpoint, a finished model or an export.
    """
    folder = Path(folder)
    found = [path for path in (*folder.iterdir(), *folder.glob("onnx/*")) if path.suffix in _LISTED_SUFFIXES]
    names = sorted(path.relative_to(folder).as_posix() for path in found if path.is_file())
    lines = [f"{digest}  {name}\n" for name, digest in _digests(folder, names, to_disk=True).items()]
    temporary = folder / f".{MANIFEST}.{os.getpid()}"
    temporary.write_text("".join(lines), encoding="utf-8")
    _to_disk(temporary)
    temporary.replace(folder / MANIFEST)
    _to_disk(folder)
    return folder / MANIFEST


def remove_checksums(folder: str | Path) -> None:
    """Before or after files of a folder change: what is listed is not what is there."""
    Path(folder, MANIFEST).unlink(missing_ok=True)


def find_damage(folder: str | Path, is_complete: bool = True, names: Collection[str] | None = None) -> str | None:
    """
    What in a folder is not as it was when it was finished, in a few words that name the file; `None` if all is, or if
    it has no list.

    Args:
        folder (`str` or `Path`): of a checkpoint, a finished model or an export.
        is_complete (`bool`, *optional*, defaults to `True`): whether a listed file that is not there is damage.
        names (`Collection[str]`, *optional*): look at these files only.
    """
    folder = Path(folder)
    if not (folder / MANIFEST).is_file():
        return None
    lines = (folder / MANIFEST).read_bytes().decode("utf-8", "replace").splitlines()
    found = [_LINE.fullmatch(line) for line in lines]
    if not found or None in found:
        return f"{MANIFEST} is damaged"
    expected = {match[2]: match[1] for match in found if names is None or match[2] in names}
    missing = [name for name in expected if not (folder / name).is_file()]
    if missing and is_complete:
        return f"no {missing[0]}, which {MANIFEST} lists"
    there = [name for name in expected if name not in missing]
    changed = [name for name, digest in _digests(folder, there).items() if digest != expected[name]]
    return f"{', '.join(changed[:4])}: not the content that {MANIFEST} lists" if changed else None


def check_checksums(folder: str | Path, is_complete: bool = True, names: Collection[str] | None = None) -> None:
    """
    Refuse a folder with damage; arguments as of [`find_damage`].

    Raises:
        OSError: naming the file, and what to do.
    """
    damage = find_damage(folder, is_complete, names)
    if damage:
        raise OSError(
            f"{folder} is damaged, or was changed after it was finished: {damage}. Get it again, or take another one."
            f" If the change is meant, delete {MANIFEST}."
        )


def _digests(folder: Path, names: list[str], to_disk: bool = False) -> dict[str, str]:
    # hashlib lets go of Python's lock: weights and optimizer are read side by side.
    with ThreadPoolExecutor(max_workers=4) as pool:
        paths = [folder / name for name in names]
        if to_disk:
            list(pool.map(_to_disk, paths))
        return dict(zip(names, pool.map(_digest, paths), strict=True))


def _to_disk(path: Path) -> None:
    if os.name != "posix":  # elsewhere files that are only read, and folders, cannot be synced
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
