"""What a local folder of images means: which part is which split, which file is of which class."""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import PIL.Image
from datasets.data_files import FILES_TO_IGNORE, NON_WORDS_CHARS, SPLIT_KEYWORDS

from .decoding import FORMATS


SPLITS = {keyword: str(split) for split, keywords in SPLIT_KEYWORDS.items() for keyword in keywords}
IMAGE_SUFFIXES = {suffix for suffix, kind in PIL.Image.EXTENSION.items() if kind in (*FORMATS, "MPO")}
# In a class folder, what may hold images of the class that would be left out in silence.
UNREAD_SUFFIXES = {*PIL.Image.EXTENSION, ".heic", ".heif", ".jxl", ".svg", ".npy", ".npz", ".parquet", ".arrow",
                   ".zip", ".tar", ".tgz", ".gz", ".bz2", ".xz", ".7z", ".rar"} - IMAGE_SUFFIXES  # fmt: skip
ONE_CLASS = "image"  # of images whose labels are not read
METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
DEBRIS = {"__macosx", "__pycache__", "@eadir", "$recycle.bin", "system volume information", "lost+found", "thumbs.db",
          "desktop.ini", "icon\r", *(name.lower() for name in FILES_TO_IGNORE)}  # fmt: skip
_WORDS = re.compile(f"[{NON_WORDS_CHARS}/]+")


@dataclass
class SplitFiles:
    """
    The files of one split.

    Attributes:
        kind: `"class folders"`, `"metadata"`, `"parquet"` or `"idx"`.
        path: the folder that was understood as this split.
        files: of images; or the parquet, metadata or IDX files.
        labels: of class folders: the class of each file.
        classes: of class folders: in the order of `datasets` and torchvision (1, 10, 2).
        images: of a metadata file: the image files found beside it.
    """

    kind: str
    path: str
    files: list[str]
    labels: list[str] | None = None
    classes: list[str] | None = None
    images: list[str] | None = None

    @property
    def origin(self) -> str:
        more = f" and {len(self.files) - 1} more" if len(self.files) > 1 else ""
        return self.path if self.kind == "class folders" else f"{self.files[0]}{more}"


def read_layout(
    directory: str | Path, find_splits: bool = True, labelled: bool = True
) -> tuple[dict[str, SplitFiles], list[str]]:
    """
    The splits of a folder, by the names that `datasets` knows in upper or lower case, and what in it was ignored:
    hidden files and folders, what operating systems leave behind, and files in class folders that are no images.

    Args:
        directory (`str` or `Path`): see docs/data.md for all that is accepted, ignored and refused.
        find_splits (`bool`, *optional*, defaults to `True`): else the folder is one split, `train`, whatever is in it.
        labelled (`bool`, *optional*, defaults to `True`):
            Else every image of a split, however deep in folders, is of the one class `ONE_CLASS`.

    Raises:
        FileNotFoundError, NotADirectoryError: if there is no such folder.
        ValueError: naming what has no clear meaning.
    """
    directory = os.path.abspath(directory)
    if not os.path.exists(directory):
        raise FileNotFoundError(f"The dataset folder {directory} does not exist.")
    if not os.path.isdir(directory):
        raise NotADirectoryError(f"{directory} is a file. Pass the folder that holds it; unpack an archive first.")
    ignored: list[str] = []
    root = _scan(directory, ignored)
    files = list(root.all_files())
    if not files:
        raise ValueError(f"The dataset folder {directory} is empty: expected images or parquet files.")
    parquet = [file for file in files if file.lower().endswith(".parquet") and _name(file) not in METADATA]
    if parquet:
        _ignore_beside_parquet(files, ignored)
        splits = _files_by_split(root, parquet, "parquet", find_splits)
    elif idx := [file for file in root.files if re.search(r"-idx[13]-ubyte", _name(file))]:
        splits = _files_by_split(root, idx, "idx", find_splits)
        _refuse_beside(root, [file for file in root.files if file not in idx] + [one.path for one in root.folders])
    else:
        folders = _split_folders(root) if find_splits else {"train": root}
        if "validation" in folders and "test" in folders:  # which often has no labels
            ignored.append(folders.pop("test").path)
        if labelled:
            splits = {split: _read_split(folder, split, ignored) for split, folder in folders.items()}
        else:
            splits = {split: _read_pictures(folder, ignored) for split, folder in folders.items()}
    if "validation" in splits and "test" in splits:
        ignored += splits.pop("test").files
    return splits, [os.path.relpath(path, directory) for path in ignored]


@dataclass(eq=False)
class _Folder:
    path: str
    folders: list["_Folder"]
    files: list[str]

    @cached_property
    def name(self) -> str:
        return os.path.basename(self.path)

    def all_files(self) -> Iterator[str]:
        yield from self.files
        for folder in self.folders:
            yield from folder.all_files()

    @property
    def metadata(self) -> list[str]:
        return [file for file in self.files if _name(file) in METADATA]

    @property
    def may_be_class(self) -> bool:
        return not self.metadata and any(_suffix(file) in IMAGE_SUFFIXES for file in self.files)


def _scan(path: str, ignored: list[str], above: tuple[str, ...] = ()) -> _Folder:
    real = os.path.realpath(path)
    if real in above:
        raise ValueError(f"{path} is a link to a folder that contains it: remove the link.")
    folders, files = [], []
    for entry in sorted(os.scandir(path), key=lambda entry: entry.name):
        if entry.name.encode("utf-8", "replace").decode() != entry.name:
            raise ValueError(f"{entry.path!r} has a name that is not UTF-8: rename it.")
        if entry.name.startswith(".") or entry.name.lower() in DEBRIS:
            ignored.append(entry.path)
        elif entry.is_dir():
            folders.append(_scan(entry.path, ignored, (*above, real)))
        else:
            files.append(entry.path)
    return _Folder(path, folders, files)


def _name(path: str) -> str:
    return os.path.basename(path).lower()


def _suffix(path: str) -> str:
    return os.path.splitext(path)[1].lower()


def _words(name: str) -> set[str]:
    return set(_WORDS.split(re.sub("(?<=[a-z])(?=[A-Z])", " ", name.replace("t10k", "test")).casefold()))


def exact_split(name: str) -> str | None:
    """The split that a whole name stands for, whatever its case: `Training`, `val2017`, `test_images`."""
    words = _words(name) - {"", "set", "data", "dataset", "images", "imgs", "pictures", "photos"}
    return SPLITS.get(words.pop()) if len(words) == 1 else None


def _splits_in(name: str) -> set[str]:
    return {SPLITS[word] for word in _words(name) if word in SPLITS}


def _split_folders(root: _Folder) -> dict[str, _Folder]:
    # A word in a longer name is a split only where the folder cannot be a class: `train_station` holds images.
    named = [one for one in root.folders if exact_split(one.name) or (_splits_in(one.name) and not one.may_be_class)]
    if not named:
        return {"train": root}
    shown = [one.name for one in named]
    for folder in root.folders:
        if folder not in named:
            raise ValueError(
                f"{folder.path} looks like no split, but beside it are {shown}. Rename it to train, validation or"
                f" test, or move it away. If {shown} are classes, pass {root.path} as `train_dir`."
            )
    _refuse_beside(root, root.files)
    by_split: dict[str, _Folder] = {}
    for folder in named:
        exact = exact_split(folder.name)
        splits = {exact} if exact else _splits_in(folder.name)
        if len(splits) > 1 or splits & set(by_split):
            raise ValueError(
                f"In {root.path}, which folder is which split is not clear: {shown}. One folder a split, please; or"
                " pass `train_dir` and `validation_dir`."
            )
        by_split[splits.pop()] = folder
    return by_split


def _files_by_split(root: _Folder, files: list[str], kind: str, find_splits: bool) -> dict[str, SplitFiles]:
    by_split: dict[str, list[str]] = {}
    for file in files:
        splits = _splits_in(os.path.relpath(file, root.path))
        if len(splits) > 1:
            raise ValueError(f"{file} names several splits: {sorted(splits)}. Name one in its path.")
        by_split.setdefault(splits.pop() if splits else "", []).append(file)
    unnamed = by_split.pop("", [])
    if unnamed and by_split:
        raise ValueError(
            f"{unnamed[0]} looks like no split, but there are files of {sorted(by_split)} beside it. Begin its name"
            " with train, validation or test, or move it away."
        )
    if not find_splits and len(by_split) > 1:
        raise ValueError(f"{root.path} is to be one split, but has files of {sorted(by_split)}: use `dataset_dir`.")
    if unnamed or not find_splits:
        by_split = {"train": files}
    return {split: SplitFiles(kind, root.path, found) for split, found in by_split.items()}


def _ignore_beside_parquet(files: list[str], ignored: list[str]) -> None:
    for file in files:
        if _suffix(file) in IMAGE_SUFFIXES | UNREAD_SUFFIXES - {".parquet"} or _name(file) in METADATA:
            raise ValueError(f"{file} lies beside parquet files: which of them are the dataset? Move the others away.")
        if _suffix(file) != ".parquet":
            ignored.append(file)


def _refuse_beside(folder: _Folder, paths: list[str]) -> None:
    if paths:
        more = f" (and {len(paths) - 1} more)" if len(paths) > 1 else ""
        raise ValueError(
            f"{paths[0]}{more} has no place in {folder.path}. Images lie in one folder per class, or beside a"
            " metadata.csv with the columns file_name and label. Move it away; unpack an archive first."
        )


def _read_split(folder: _Folder, split: str, ignored: list[str]) -> SplitFiles:
    if folder.metadata:
        images = [file for file in folder.all_files() if _suffix(file) in IMAGE_SUFFIXES]
        others = [file for file in folder.all_files() if _suffix(file) not in IMAGE_SUFFIXES][1:]
        if others or len(folder.folders) > 1:
            raise ValueError(
                f"{folder.metadata[0]} and {(others or [folder.folders[0].path])[0]}: labels are either in one"
                " metadata file (images beside it, or in one folder beside it) or in the names of class folders. Move"
                " one away."
            )
        return SplitFiles("metadata", folder.path, folder.metadata, images=images)
    _refuse_beside(folder, folder.files)
    files, labels, empty = [], [], []
    for one in folder.folders:
        if one.folders:
            raise ValueError(
                f"{one.folders[0].path} is a folder in {one.path}, but classes are the first level of folders in"
                f" {folder.path}. Move its images up; or, if {one.name} holds the classes or splits, pass that folder."
            )
        images = _images_among(one.files, ignored)
        empty += [] if images else [one.path]
        files += images
        labels += [one.name] * len(images)
    if empty and (split == "train" or not files):
        raise ValueError(
            f"{empty[0]} holds no image, but is a class by its place in {folder.path}. Put images there or remove it."
        )
    return SplitFiles("class folders", folder.path, files, labels, [one.name for one in folder.folders])


def _read_pictures(folder: _Folder, ignored: list[str]) -> SplitFiles:
    """Every image in a folder and the folders in it, without regard to classes."""
    labels = [file for file in folder.all_files() if _name(file) in METADATA]
    ignored += labels
    images = _images_among([file for file in folder.all_files() if file not in labels], ignored)
    if not images:
        raise ValueError(f"{folder.path} holds no image: they are read from {', '.join(sorted(FORMATS))} files.")
    return SplitFiles("class folders", folder.path, images, [ONE_CLASS] * len(images), [ONE_CLASS])


def _images_among(files: list[str], ignored: list[str]) -> list[str]:
    images = [file for file in files if _suffix(file) in IMAGE_SUFFIXES]
    others = [file for file in files if _suffix(file) not in IMAGE_SUFFIXES]
    unread = next((file for file in others if _suffix(file) in UNREAD_SUFFIXES or _name(file) in METADATA), None)
    if unread:
        raise ValueError(
            f"{unread} would be left out: images are read from {', '.join(sorted(FORMATS))} files. Convert, unpack"
            " or move it away."
        )
    ignored += others
    return images
