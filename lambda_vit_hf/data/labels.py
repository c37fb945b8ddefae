"""Columns of a dataset: which is the image, which the label, and what the classes are called."""

import functools
import re
from collections.abc import Mapping, Sequence

import datasets
import pyarrow.dataset


def natural_key(name: str) -> tuple[list, str]:
    """Sorts 10 after 9."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)], name


def find_columns(
    dataset: datasets.Dataset,
    image_column: str | None = None,
    label_column: str | None = None,
    where: str = "the dataset",
) -> tuple[str, str]:
    """
    Names of the image and the label column: as given, else by type. The image: the only column of type `Image` (or of
    image files as bytes). The label: the only `ClassLabel`, else a column of integers or strings called `label` or
    `labels`.

    Raises:
        ValueError: if a given column is missing or of another type, or if the choice is not clear.
    """
    image = find_image_column(dataset, image_column, where)
    return image, _find_column(dataset.features, "label", label_column, where)


def find_image_column(dataset: datasets.Dataset, image_column: str | None = None, where: str = "the dataset") -> str:
    """The name of the image column alone, as [`find_columns`] finds it, which raises the same."""
    return _find_column(dataset.features, "image", image_column, where)


def _find_column(features: datasets.Features, kind: str, given: str | None, where: str) -> str:
    images = [name for name, feature in features.items() if _is_image(feature)]
    labels = [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    labels = labels or [name for name in ("label", "labels") if name in features]
    candidates = images if kind == "image" else labels
    if given is not None:
        candidates = [given] if given in features and (kind == "label" or given in images) else []
    if len(candidates) != 1:
        columns = {name: getattr(feature, "dtype", type(feature).__name__) for name, feature in features.items()
                   } | dict.fromkeys(images, "Image") | dict.fromkeys(labels, "ClassLabel")  # fmt: skip
        raise ValueError(
            f"Expected one {kind} column{f' {given!r}' if given else ''} in {where}, found {candidates}"
            f" among {columns}. `{kind}_column` names the one to use."
        )
    return candidates[0]


def _is_image(feature) -> bool:
    if isinstance(feature, Mapping):  # as pandas writes what `datasets` calls an image
        return "bytes" in feature
    return isinstance(feature, datasets.Image) or getattr(feature, "dtype", None) in ("binary", "large_binary")


def names_of_classes(dataset: datasets.Dataset, column: str, files: Sequence[str] | None = None) -> list[str]:
    """
    The classes of a column: the names of a `ClassLabel`; else all of its integers or strings, in natural order.

    Args:
        dataset (`datasets.Dataset`): or a stream.
        column (`str`): of labels.
        files (`Sequence[str]`, *optional*): the parquet files of a stream.

    Raises:
        ValueError: naming the column, if its values are no classes: lists, floats, nothing, negative or too large.
    """
    feature = dataset.features[column]
    is_named = isinstance(feature, datasets.ClassLabel)
    dtype = getattr(feature, "dtype", type(feature).__name__)
    if not is_named and not any(kind in dtype for kind in ("int", "string", "bool")):
        raise ValueError(
            f"The label column {column!r} holds {dtype}: one class per image is expected, an integer or a string."
            " (Floats may come of rows that lack their label.)"
        )
    if not isinstance(dataset, datasets.IterableDataset):
        values = dataset.unique(column)
    elif files:
        values = pyarrow.dataset.dataset(files).to_table(columns=[column]).column(0).unique().to_pylist()
    elif is_named:
        values = []  # each is checked when it is read
    else:
        raise ValueError(f"The classes in the column {column!r} of a stream are not known: load it whole.")
    if None in values:
        raise ValueError(
            f"The label column {column!r} has rows without a label: fill them in or remove them. (In a CSV file"
            " classes named NA, None or null count as such: name them otherwise.)"
        )
    limit = feature.num_classes if is_named else float("inf")
    if wrong := [value for value in values if isinstance(value, int) and not 0 <= value < limit]:
        expected = f"lie outside the {limit} classes" if is_named else "are negative"
        raise ValueError(f"Labels {wrong[:5]} of the column {column!r} {expected}: is it a split without labels?")
    return feature.names if is_named else sorted((str(value) for value in values), key=natural_key)


def with_class_labels(dataset, column: str, found: Sequence[str], names: Sequence[str]):
    """The dataset or stream with a `ClassLabel` column of `names`, in the place of classes that were `found`."""
    feature = datasets.ClassLabel(names=list(names))
    if dataset.features[column] == feature:
        return dataset
    index = None
    if not isinstance(dataset.features[column], datasets.ClassLabel):
        index = {name: number for number, name in enumerate(found)}
    if isinstance(dataset, datasets.IterableDataset):
        features = datasets.Features({**dataset.features, column: feature})
        return dataset.map(functools.partial(_encode, column=column, index=index), batched=True, features=features)
    labels = _encode({column: dataset[column]}, column, index)[column]
    # Not cast_column: it would write all images anew.
    return dataset.remove_columns(column).add_column(column, labels, feature=feature)


def with_one_class(dataset, name: str):
    """The dataset or stream, which has no column `label`, with one where every image is of the same class."""
    feature = datasets.ClassLabel(names=[name])
    if isinstance(dataset, datasets.IterableDataset):
        features = datasets.Features({**dataset.features, "label": feature})
        return dataset.map(_first_class, batched=True, features=features)
    return dataset.add_column("label", [0] * len(dataset), feature=feature)


def _first_class(batch: dict) -> dict:
    return {"label": [0] * len(batch["image"])}


def _encode(batch: dict, column: str, index: dict[str, int] | None) -> dict:
    return {column: [value if index is None else index[str(value)] for value in batch[column]]}


def compare_classes(found: Mapping[str, Sequence[str]]) -> None:
    """
    Raises:
        ValueError: naming the classes in which splits differ, or that there are fewer than two.
    """
    (first, names), *others = found.items()
    if len(names) < 2:
        raise ValueError(f"At least two classes are needed, found {some(names)} in {first}.")
    for split, other in others:
        extra = {first: set(names) - set(other), split: set(other) - set(names)}
        only = [
            f"only {one} has {some(sorted(classes, key=natural_key))}" for one, classes in extra.items() if classes
        ]
        if only:
            raise ValueError(
                f"The classes of the splits differ: {' and '.join(only)}. Both need the same; a class without images"
                " in validation may be an empty folder there."
            )
        if list(other) != list(names):
            raise ValueError(
                f"The classes of the splits differ in their order: {first} {some(names)}, {split} {some(other)}."
            )


def some(names: Sequence[str], limit: int = 5) -> str:
    """The first of many names, for people."""
    more = f" and {len(names) - limit:,} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
