"""The one loader of images: digits, local folders, datasets of the Hub; whole, or as a stream."""

import functools
import glob
import logging
import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import datasets
import numpy as np
import PIL.Image
import pyarrow.parquet
import torch

from .idx_files import load_idx
from .labels import (
    compare_classes,
    find_columns,
    find_image_column,
    names_of_classes,
    some,
    with_class_labels,
    with_one_class,
)
from .layout import ONE_CLASS, SplitFiles, exact_split, read_layout
from .shards import as_stream, note_sizes, sizes_of_stream, whole


logger = logging.getLogger(__name__)


def load_digits(seed: int = 0) -> dict[str, datasets.Dataset]:
    """
    The 1,797 handwritten digits that ship with scikit-learn: 8 x 8 gray PNGs, 80 % `train` and 20 % `validation`,
    stratified.
    """
    return _with_validation({"train": _all_digits()}, seed)


@functools.cache
def _all_digits() -> datasets.Dataset:
    from sklearn.datasets import load_digits as sklearn_digits

    digits = sklearn_digits()
    images = [PIL.Image.fromarray((image * (255 / 16)).round().astype(np.uint8)) for image in digits.images]
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=[str(digit) for digit in range(10)])}
    )
    return datasets.Dataset.from_dict({"image": images, "label": digits.target.tolist()}, features=features)


def load_image_dataset(
    name: str | None = None,
    directory: str | Path | None = None,
    seed: int = 0,
    config_name: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    streaming: bool = False,
    train_dir: str | Path | None = None,
    validation_dir: str | Path | None = None,
    class_names: Sequence[str] | None = None,
    needed: str = "train",
    labelled: bool = True,
) -> dict[str, datasets.Dataset | datasets.IterableDataset]:
    """
    Splits `train` and `validation`, each with an `Image` column `image` and a `ClassLabel` column `label`. What was
    understood is logged.

    Args:
        name (`str`, *optional*): `"digits"`, or the id of a dataset on the Hub; or
        directory (`str` or `Path`, *optional*):
            A local folder: images in one folder per class, with or without a folder for each split above them; parquet
            files; images with a `metadata.csv`; or the IDX files of the MNIST family. docs/data.md has the rules. Or
        train_dir, validation_dir (`str` or `Path`, *optional*):
            A folder for each split. Of their folders each is a class, though it be called `train`.
        seed (`int`, *optional*, defaults to 0):
            Of the random fifth of `train` that is held out where there is neither a validation nor a test split.
        config_name (`str`, *optional*): configuration of a dataset on the Hub.
        image_column, label_column (`str`, *optional*): see [`~lambda_vit_hf.data.labels.find_columns`].
        streaming (`bool`, *optional*, defaults to `False`):
            `train` is a `datasets.IterableDataset` for [`~lambda_vit_hf.data.streaming.StreamedImages`], with images
            undecoded; parquet files and the Hub are then read as training goes on, and never copied to the disk.
            `validation` is a `datasets.Dataset` all the same: it is small, read again and again, and no image of it
            may count twice. Of a dataset on the Hub it is downloaded once and kept in the cache of `datasets`.
        class_names (`Sequence[str]`, *optional*): other names for the classes, in their order.
        needed (`str`, *optional*, defaults to `"train"`):
            With `"validation"`, a dataset without training images is accepted.
        labelled (`bool`, *optional*, defaults to `True`):
            With `False` no labels are needed, and those that are there are not read: `label` is 0 everywhere. A local
            folder may then hold its images without class folders, or in folders of any depth.

    Raises:
        FileNotFoundError, NotADirectoryError: if a folder does not exist.
        ValueError: naming the folder, file, column or classes without a clear meaning; if there are no images; if
            parquet files or the Hub are streamed without a validation set.
    """
    if [bool(name), bool(directory), bool(train_dir or validation_dir)].count(True) != 1:
        raise ValueError(
            "Give exactly one of a dataset name, a dataset directory, and train_dir (with or without validation_dir)."
        )
    if name and name != "digits" and os.path.isdir(name):
        name, directory = None, name
    files, ignored = {}, []
    if name == "digits":
        loaded = {"train": _all_digits()}
    elif name:
        loaded, ignored = _load_from_hub(name, config_name, streaming)
    else:
        files, ignored = _read_layouts(directory, {"train": train_dir, "validation": validation_dir}, labelled)
        if len({os.path.realpath(part.files[0]) for part in files.values()}) < len(files):
            raise ValueError(f"{' and '.join(files)} are the same files: {next(iter(files.values())).origin}.")
        loaded = {split: _load_files(split, part, streaming) for split, part in files.items()}
    origin = {split: files[split].origin if split in files else name for split in loaded}
    if "train" not in loaded and not (needed == "validation" and {"validation", "test"} & set(loaded)):
        raise ValueError(f"A `train` split is needed, found {list(loaded)} in {name or directory or validation_dir}.")
    if "test" in loaded and "validation" not in loaded:
        loaded["validation"] = loaded.pop("test")
        origin["validation"] = f"{origin['test']}, a test split, as there is no validation split"
    loaded = {split: loaded[split] for split in ("train", "validation") if split in loaded}
    if labelled:
        loaded, classes = _with_labels(loaded, files, origin, image_column, label_column, class_names)
    else:
        image_column = find_image_column(next(iter(loaded.values())), image_column)
        for split, part in loaded.items():
            find_image_column(part, image_column, origin[split])
            loaded[split] = with_one_class(_columns(part, {image_column: "image"}), ONE_CLASS)
        classes = "labels are not read"
    if "validation" not in loaded:
        loaded = _with_validation(loaded, seed)
        origin["validation"] = "a random fifth of train, as there is no validation split"
    _say(loaded, origin, classes, ignored)
    if streaming and "train" in loaded and not _is_stream(loaded["train"]):
        loaded["train"] = as_stream(loaded["train"])
    return loaded


def _is_stream(part) -> bool:
    return isinstance(part, datasets.IterableDataset)


def _with_labels(
    loaded: Mapping, files: Mapping[str, SplitFiles], origin: Mapping, image_column, label_column, class_names
) -> tuple[dict, str]:
    """The splits with the columns `image` and `label`, and what there is to say of their classes."""
    columns = find_columns(next(iter(loaded.values())), image_column, label_column)
    classes, parts = {}, {}
    for split, part in loaded.items():
        find_columns(part, *columns, where=origin[split])
        classes[split] = names_of_classes(part, columns[1], files[split].files if split in files else None)
        parts[split] = _columns(part, dict(zip(columns, ("image", "label"), strict=True)))
    compare_classes(classes)
    found = next(iter(classes.values()))
    names = list(class_names or found)
    if len(names) != len(found) or len(set(names)) != len(names):
        raise ValueError(f"`class_names` must be {len(found)} different names, for {some(found)}; got {names}.")
    is_by_folder = files and all(part.kind == "class folders" for part in files.values())
    labels = "the class folders" if is_by_folder else f"the column {columns[1]!r}"
    labels = f"{labels} ({some(found)})" if class_names else labels
    what = f"{len(names)} classes, in this order: {some(names, 10)}; labels from {labels}"
    return {split: with_class_labels(part, "label", found, names) for split, part in parts.items()}, what


def _read_layouts(directory, one_each: Mapping, labelled: bool) -> tuple[dict[str, SplitFiles], list[str]]:
    if directory:
        return read_layout(directory, labelled=labelled)
    files, ignored = {}, []
    for split, folder in one_each.items():
        if folder:
            found, more = read_layout(folder, find_splits=False, labelled=labelled)
            files[split] = found["train"]
            ignored += more
    return files, ignored


def _load_files(split: str, part: SplitFiles, streaming: bool) -> datasets.Dataset | datasets.IterableDataset:
    if part.kind == "idx":
        return load_idx(part.files)
    if part.kind == "class folders":
        features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=part.classes)})
        index = {name: number for number, name in enumerate(part.classes)}
        rows = {"image": part.files, "label": [index[name] for name in part.labels]}
        return datasets.Dataset.from_dict(rows, features=features)
    if part.kind == "metadata":
        loaded = _load_table("imagefolder", split, part.files)
        _compare_with_files(loaded, part)
        return loaded
    sizes = [_num_rows(file) for file in part.files]
    if not any(sizes):
        raise ValueError(f"{part.files[0]} has no rows: expected the images of split {split}.")
    loaded = _load_table("parquet", split, part.files, streaming=streaming and split == "train")
    if _is_stream(loaded):
        note_sizes(loaded, sizes)
    return loaded


def _load_table(kind: str, split: str, files: list[str], **options):
    try:
        # Each split alone: read together, all would get the class names of the first, in its order.
        return datasets.load_dataset(kind, data_files={split: [glob.escape(file) for file in files]}, **options)[split]
    except (ValueError, IndexError, datasets.exceptions.DatasetGenerationError) as error:
        raise ValueError(
            f"{files[0]} (split {split}) cannot be read, or is empty: {error.__cause__ or error}"
        ) from error


def _num_rows(file: str) -> int:
    try:
        return pyarrow.parquet.read_metadata(file).num_rows
    except pyarrow.ArrowException as error:
        raise ValueError(f"{file} is no parquet file, or is cut short: {error}") from error


def _compare_with_files(loaded: datasets.Dataset, part: SplitFiles) -> None:
    rows = loaded.cast_column("image", datasets.Image(decode=False))["image"] if "image" in loaded.features else []
    described = Counter(row["path"] for row in rows)
    for problem, paths in {
        "names images that do not exist": set(described) - set(part.images),
        "does not name images that lie beside it": set(part.images) - set(described),
        "names images twice": {path for path, count in described.items() if count > 1},
    }.items():
        if paths:
            raise ValueError(f"{part.files[0]} {problem}: {some(sorted(paths))}.")


def _load_from_hub(name: str, config_name: str | None, streaming: bool) -> tuple[dict, list[str]]:
    builder = datasets.load_dataset_builder(name, config_name)
    _check_split_folders(name, builder.config.data_files or {})
    loaded = builder.as_streaming_dataset() if streaming else datasets.load_dataset(name, config_name)
    keys: dict[str, str] = {}
    for key in sorted(map(str, loaded), key=lambda key: key != exact_split(key)):
        if exact_split(key):
            keys.setdefault(exact_split(key), key)
    known = {split: loaded[key] for split, key in keys.items()}
    if streaming and (held_out := next((split for split in ("validation", "test") if split in known), None)):
        # The builder's folder names the dataset, its configuration and its revision.
        known = {split: part for split, part in known.items() if split in ("train", held_out)}
        known[held_out] = whole(known[held_out], f"{builder.cache_dir} {keys[held_out]}")
    return known, [f"split {key}" for key in map(str, loaded) if key not in keys.values()]


def _check_split_folders(name: str, data_files: Mapping[str, Sequence[str]]) -> None:
    # `datasets` knows split names in lower case only: of Training and Testing it makes one split.
    for split, files in data_files.items():
        for file in files:
            folders = str(file).split("@")[-1].split("/")[1:-1]
            meant = next((exact_split(folder) for folder in folders if exact_split(folder)), None)
            if meant and meant != exact_split(str(split)):
                raise ValueError(
                    f"{name} has {file} in its split {split}, though its folder says {meant}. Download the dataset and"
                    " pass its folder as `dataset_dir`."
                )


def _columns(part, new_names: dict[str, str]):
    """These columns only, by other names; the one that becomes `image` comes first."""
    image_column = next(iter(new_names))
    # A stream stays undecoded: `datasets` would decode every image to rename a column.
    wanted = datasets.Image(decode=not _is_stream(part))
    if part.features[image_column] != wanted:
        part = part.cast_column(image_column, wanted)
    part = part.select_columns(list(new_names))
    new_names = {old: new for old, new in new_names.items() if old != new}
    return part.rename_columns(new_names) if new_names else part


def _with_validation(loaded: Mapping, seed: int) -> dict:
    train = loaded["train"]
    if _is_stream(train):
        raise ValueError("A stream needs a `validation` split: only of a dataset on the disk can a part be taken.")
    names, counts = train.features["label"].names, Counter(train["label"])
    if lonely := [names[label] for label, count in sorted(counts.items()) if count < 2]:
        raise ValueError(
            f"Classes with one image: {some(lonely)}. A fifth of each class is held out for validation, which takes"
            " two at least: add images, remove the class, or pass a validation split."
        )
    size = max(math.ceil(0.2 * len(train)), len(counts))
    parts = train.train_test_split(test_size=size, stratify_by_column="label", seed=seed)
    return {"train": parts["train"], "validation": parts["test"]}


def _say(loaded: Mapping, origin: Mapping, classes: str, ignored: list[str]) -> None:
    if torch.distributed.is_available() and torch.distributed.is_initialized() and torch.distributed.get_rank() > 0:
        return
    for split, part in loaded.items():
        size = sizes_of_stream(part)[0] if _is_stream(part) else len(part)
        logger.info("%s: %s images (%s)", split, f"{size:,}" if size else "an unknown number of", origin[split])
    logger.info(classes)
    if ignored:
        logger.info("Ignored: %s", some(ignored))
