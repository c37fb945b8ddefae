"""Where images come from: digits, folders, parquet and IDX files, datasets of the Hub; whole, or as a stream."""

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path

import datasets
import numpy as np
import PIL.Image
import pyarrow.parquet

from .decoding import MAX_PIXELS, UnreadableImageError, UnreadableImages, image_name, open_image
from .idx_files import load_idx
from .sampling import evenly_spaced


SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
    "testing": "test",
}


def load_digits(seed: int = 0) -> dict[str, datasets.Dataset]:
    """
    The 1,797 handwritten digits that ship with scikit-learn: 8 x 8 gray PNGs, 80 % `train` and 20 % `validation`,
    stratified.
    """
    from sklearn.datasets import load_digits as sklearn_digits

    digits = sklearn_digits()
    images = [PIL.Image.fromarray((image * (255 / 16)).round().astype(np.uint8)) for image in digits.images]
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=[str(digit) for digit in range(10)])}
    )
    whole = datasets.Dataset.from_dict({"image": images, "label": digits.target.tolist()}, features=features)
    return _with_validation({"train": whole}, "label", seed)


def load_image_dataset(
    name: str | None = None,
    directory: str | Path | None = None,
    seed: int = 0,
    config_name: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    streaming: bool = False,
) -> dict[str, datasets.Dataset | datasets.IterableDataset]:
    """
    Splits `train` and `validation`, each with an `Image` column `image` and a `ClassLabel` column `label`.

    Args:
        name (`str`, *optional*): `"digits"`, or the id of a dataset on the Hub; or
        directory (`str` or `Path`, *optional*):
            A local folder: parquet files (`train*.parquet`, `validation*.parquet`); images in one folder per class,
            with or without `train` and `validation` (or `test`) above them; or the four IDX files of the MNIST
            family (`train-images-idx3-ubyte.gz`, ...), with or without gzip.
        seed (`int`, *optional*, defaults to 0): for the split, where there is no validation set: a fifth of `train`.
        config_name (`str`, *optional*): configuration of a dataset on the Hub.
        image_column, label_column (`str`, *optional*): by default the only columns of type `Image` and `ClassLabel`.
        streaming (`bool`, *optional*, defaults to `False`):
            `train` is a `datasets.IterableDataset` for [`~lambda_vit_hf.data.streaming.StreamedImages`], with images
            undecoded; parquet files and the Hub are then read as training goes on, and never copied to the disk.
            `validation` is a `datasets.Dataset` all the same: it is small, read again and again, and no image of it
            may count twice. Of a dataset on the Hub it is downloaded once and kept in the cache of `datasets`.

    Raises:
        FileNotFoundError: if `directory` does not exist.
        ValueError: if there are no images or labels, if the splits differ in their classes, or if parquet files or
            the Hub are streamed without a validation set.
    """
    if (name is None) == (directory is None):
        raise ValueError("Give exactly one of a dataset name and a dataset directory.")
    if name == "digits":
        loaded = load_digits(seed)
    elif name is not None:
        loaded = _stream_from_hub(name, config_name) if streaming else datasets.load_dataset(name, config_name)
    else:
        loaded = _load_directory(Path(directory), streaming)
    one_split = loaded["train"] if "train" in loaded else next(iter(loaded.values()))
    columns = find_columns(one_split, image_column, label_column)
    loaded = {split: _two_columns(part, *columns) for split, part in loaded.items()}
    loaded = _with_validation(loaded, "label", seed)
    if streaming and isinstance(loaded["train"], datasets.Dataset):
        loaded["train"] = as_stream(loaded["train"])
    return loaded


def _two_columns(part, image_column: str, label_column: str):
    if isinstance(part, datasets.IterableDataset):
        # First of all: `datasets` would decode every image of a stream to rename its column.
        part = part.cast_column(image_column, datasets.Image(decode=False))
    part = part.select_columns([image_column, label_column])
    new_names = {image_column: "image", label_column: "label"}
    new_names = {old: new for old, new in new_names.items() if old != new}
    return part.rename_columns(new_names) if new_names else part


def _load_directory(directory: Path, streaming: bool) -> dict[str, datasets.Dataset | datasets.IterableDataset]:
    if not directory.is_dir():
        raise FileNotFoundError(f"The dataset folder {directory} does not exist.")
    parquet = sorted(directory.rglob("*.parquet"))
    if parquet:
        files: dict[str, list[str]] = {}
        for path in parquet:
            files.setdefault(_split_of(path.relative_to(directory)), []).append(str(path))
        # Each split alone: read together, all would get the class names of the first, in its order.
        return {split: _load_parquet(split, paths, streaming and split == "train") for split, paths in files.items()}
    if list(directory.glob("train-images*idx3-ubyte*")):
        return load_idx(directory)
    if not any(path.is_file() for path in directory.rglob("*")):
        raise ValueError(f"The dataset folder {directory} is empty: expected images or parquet files.")
    splits = {
        SPLIT_NAMES[path.name]: path for path in directory.iterdir() if path.is_dir() and path.name in SPLIT_NAMES
    }
    if "train" not in splits:
        splits = {"train": directory}
    _check_folder_classes(splits)
    # Named one by one: left to itself, imagefolder takes a class such as `train_track` for a split.
    files = {split: str(path / "**") for split, path in splits.items()}
    return datasets.load_dataset("imagefolder", data_files=files, drop_labels=False)


def _load_parquet(split: str, paths: list[str], streaming: bool) -> datasets.Dataset | datasets.IterableDataset:
    loaded = datasets.load_dataset("parquet", data_files={split: paths}, streaming=streaming)[split]
    if streaming:
        _note_sizes(loaded, [pyarrow.parquet.read_metadata(path).num_rows for path in paths])
    return loaded


def _stream_from_hub(name: str, config_name: str | None) -> dict[str, datasets.Dataset | datasets.IterableDataset]:
    builder = datasets.load_dataset_builder(name, config_name)
    loaded = {str(split): stream for split, stream in builder.as_streaming_dataset().items()}
    for split in ("validation", "test"):
        if split in loaded:
            # The builder's folder names the dataset, its configuration and its revision.
            fingerprint = hashlib.sha256(f"{builder.cache_dir} {split}".encode()).hexdigest()[:16]
            stream = loaded[split].cast_column(find_columns(loaded[split])[0], datasets.Image(decode=False))
            loaded[split] = datasets.Dataset.from_generator(
                _rows, features=loaded[split].features, gen_kwargs={"stream": stream}, fingerprint=fingerprint
            )
            break
    return {split: part for split, part in loaded.items() if split == "train" or isinstance(part, datasets.Dataset)}


def _rows(stream: datasets.IterableDataset):
    yield from stream


def as_stream(dataset: datasets.Dataset, num_shards: int | None = None, seed: int = 0) -> datasets.IterableDataset:
    """
    A dataset on the disk as a stream in random order (the same for the same seed), images undecoded.

    Args:
        dataset (`datasets.Dataset`): with columns `image` and `label`.
        num_shards (`int`, *optional*): by default one for 64 images, at most 256.
        seed (`int`, *optional*, defaults to 0): of the order.
    """
    size = len(dataset)
    num_shards = num_shards or min(256, -(-size // 64))
    order = np.random.default_rng(seed).permutation(size)
    dataset = dataset.cast_column("image", datasets.Image(decode=False)).select(order)
    stream = dataset.to_iterable_dataset(num_shards=num_shards)
    _note_sizes(stream, [size // num_shards + (index < size % num_shards) for index in range(num_shards)])
    return stream


def _note_sizes(stream: datasets.IterableDataset, sizes: list[int]) -> None:
    split = datasets.SplitInfo("train", num_examples=sum(sizes), original_shard_lengths=sizes)
    stream.info.splits = datasets.SplitDict({"train": split})


def sizes_of_stream(stream: datasets.IterableDataset) -> tuple[int | None, list[int] | None]:
    """
    Number of images in the `train` split of a stream, and in each of its shards; `None` where that is not known
    without reading (the shards of a dataset on the Hub; such a dataset as a whole, if its page does not say it).
    """
    split = (stream.info.splits or {}).get("train")
    if split is None or not split.num_examples:
        return None, None
    sizes = split.original_shard_lengths
    fits = sizes is not None and len(sizes) == stream.num_shards and sum(sizes) == split.num_examples
    return split.num_examples, sizes if fits else None


def _split_of(path: Path) -> str:
    """Split of a parquet file, by the first word of its name (`validation-00000-of-00003`), then by its folders."""
    words = [re.split(r"[-_.]", path.name.lower())[0], *reversed([part.lower() for part in path.parts[:-1]])]
    return next((SPLIT_NAMES[word] for word in words if word in SPLIT_NAMES), "train")


def _check_folder_classes(splits: Mapping[str, Path]) -> None:
    # imagefolder merges the classes of all splits, which shifts the labels of one split by another's folders.
    classes = {name: {entry.name for entry in path.iterdir() if entry.is_dir()} for name, path in splits.items()}
    for name, found in classes.items():
        if found != classes["train"]:
            only = sorted(found ^ classes["train"])
            raise ValueError(f"The class folders of {splits[name]} and {splits['train']} differ: {only}.")


def find_columns(
    dataset: datasets.Dataset, image_column: str | None = None, label_column: str | None = None
) -> tuple[str, str]:
    """
    Names of the image and the label column: as given, else by type.

    Raises:
        ValueError: if a given column is missing or of another type, or if the choice is not clear.
    """
    found = {}
    wishes = ((datasets.Image, image_column, "image_column"), (datasets.ClassLabel, label_column, "label_column"))
    for kind, wish, option in wishes:
        names = [name for name, feature in dataset.features.items() if isinstance(feature, kind)]
        names = names if wish is None else [name for name in names if name == wish]
        if len(names) != 1:
            columns = {name: type(feature).__name__ for name, feature in dataset.features.items()}
            raise ValueError(
                f"Expected one {kind.__name__} column{f' {wish!r}' if wish else ''}, found {names} among {columns}."
                f" `{option}` names the one to use."
            )
        found[kind] = names[0]
    return found[datasets.Image], found[datasets.ClassLabel]


def _with_validation(loaded: Mapping, label_column: str, seed: int) -> dict:
    if "train" not in loaded:
        raise ValueError(f"A `train` split is needed, found {list(loaded)}.")
    train = loaded["train"]
    names = train.features[label_column].names
    if len(names) < 2:
        raise ValueError(f"At least two classes are needed, found {names}.")
    validation = next((loaded[name] for name in ("validation", "test") if name in loaded), None)
    if validation is None:
        if isinstance(train, datasets.IterableDataset):
            raise ValueError("A stream needs a `validation` split: only of a dataset on the disk can a part be taken.")
        parts = train.train_test_split(test_size=0.2, stratify_by_column=label_column, seed=seed)
        return {"train": parts["train"], "validation": parts["test"]}
    if validation.features[label_column].names != names:
        raise ValueError(
            f"The classes of the splits differ: train has {names}, validation has"
            f" {validation.features[label_column].names}."
        )
    return {"train": train, "validation": validation}


def check_images(
    dataset: datasets.Dataset,
    limit: int = 50_000,
    unreadable: UnreadableImages | None = None,
    max_pixels: int = MAX_PIXELS,
) -> None:
    """
    Read the header of every image (of `limit` evenly spaced ones, if there are more), without decoding pixels, and
    check every label.

    Args:
        dataset (`datasets.Dataset`): with columns `image` and `label`.
        limit (`int`, *optional*, defaults to 50,000): images to look at.
        unreadable ([`~lambda_vit_hf.data.decoding.UnreadableImages`], *optional*):
            Notes files that are no images, and raises if they are too many; by default the first raises.
        max_pixels (`int`, *optional*): see [`~lambda_vit_hf.data.decoding.decode_image`].

    Raises:
        ValueError: naming the first files that are no images, or a label outside the classes.
        UnreadableImageError: if `unreadable` says so.
    """
    undecoded = dataset.cast_column("image", datasets.Image(decode=False))
    broken = []
    for index in evenly_spaced(len(undecoded), limit):
        item, name = undecoded[index]["image"], f"row {index}"
        if unreadable is not None and unreadable.on_error == "skip":
            unreadable.check(item, name, max_pixels)
            continue
        try:
            with open_image(item, max_pixels, name):
                pass
        except UnreadableImageError as error:
            broken.append(f"{image_name(item, name)} ({type(error.__cause__).__name__})")
    if broken:
        shown = ", ".join(broken[:5])
        raise ValueError(
            f"{len(broken)} files of the dataset are no readable images: {shown}. Remove or replace them."
        )
    num_classes = dataset.features["label"].num_classes
    bad_labels = [label for label in set(undecoded["label"]) if label is None or not 0 <= label < num_classes]
    if bad_labels:
        raise ValueError(f"Labels {bad_labels[:5]} lie outside the {num_classes} classes of the `label` column.")
