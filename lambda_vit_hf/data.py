"""Image datasets as `datasets` gives them, and as the Trainer takes them: decoded, augmented, processed."""

import io
import random
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import datasets
import numpy as np
import PIL.Image
import torch
from torch.utils.data import Dataset
from transformers import TrainerCallback

from .calibration import evenly_spaced, fixed_randomness


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


def load_digits(seed: int = 0) -> datasets.DatasetDict:
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
    return _with_validation(datasets.DatasetDict(train=whole), "label", seed)


def load_image_dataset(
    name: str | None = None,
    directory: str | Path | None = None,
    seed: int = 0,
    config_name: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
) -> datasets.DatasetDict:
    """
    A `DatasetDict` with splits `train` and `validation`, an `Image` and a `ClassLabel` column.

    Args:
        name (`str`, *optional*): `"digits"`, or the id of a dataset on the Hub; or
        directory (`str` or `Path`, *optional*):
            A local folder: parquet files (`train*.parquet`, `validation*.parquet`), or images in one folder per class,
            with or without `train` and `validation` (or `test`) above them.
        seed (`int`, *optional*, defaults to 0): for the split, where there is no validation set: a fifth of `train`.
        config_name (`str`, *optional*): configuration of a dataset on the Hub.
        image_column, label_column (`str`, *optional*): by default the only columns of type `Image` and `ClassLabel`.

    Raises:
        FileNotFoundError: if `directory` does not exist.
        ValueError: if there are no images or labels, or if the splits differ in their classes.
    """
    if (name is None) == (directory is None):
        raise ValueError("Give exactly one of a dataset name and a dataset directory.")
    if name == "digits":
        return load_digits(seed)
    loaded = datasets.load_dataset(name, config_name) if name else _load_directory(Path(directory))
    one_split = loaded["train"] if "train" in loaded else next(iter(loaded.values()))
    image_column, label_column = find_columns(one_split, image_column, label_column)
    loaded = loaded.select_columns([image_column, label_column])
    loaded = loaded.rename_columns(
        {old: new for old, new in ((image_column, "image"), (label_column, "label")) if old != new}
    )
    return _with_validation(loaded, "label", seed)


def _load_directory(directory: Path) -> datasets.DatasetDict:
    if not directory.is_dir():
        raise FileNotFoundError(f"The dataset folder {directory} does not exist.")
    parquet = sorted(directory.rglob("*.parquet"))
    if parquet:
        files: dict[str, list[str]] = {}
        for path in parquet:
            files.setdefault(_split_of(path.relative_to(directory)), []).append(str(path))
        # Each split alone: read together, all would get the class names of the first, in its order.
        return datasets.DatasetDict(
            {
                split: datasets.load_dataset("parquet", data_files={split: paths})[split]
                for split, paths in files.items()
            }
        )
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


def _with_validation(loaded: datasets.DatasetDict, label_column: str, seed: int) -> datasets.DatasetDict:
    if "train" not in loaded:
        raise ValueError(f"A `train` split is needed, found {list(loaded)}.")
    names = loaded["train"].features[label_column].names
    if len(names) < 2:
        raise ValueError(f"At least two classes are needed, found {names}.")
    validation = next((loaded[name] for name in ("validation", "test") if name in loaded), None)
    if validation is None:
        parts = loaded["train"].train_test_split(test_size=0.2, stratify_by_column=label_column, seed=seed)
        return datasets.DatasetDict(train=parts["train"], validation=parts["test"])
    if validation.features[label_column].names != names:
        raise ValueError(
            f"The classes of the splits differ: train has {names}, validation has"
            f" {validation.features[label_column].names}."
        )
    return datasets.DatasetDict(train=loaded["train"], validation=validation)


def check_images(dataset: datasets.Dataset, limit: int = 50_000) -> None:
    """
    Read the header of every image (of `limit` evenly spaced ones, if there are more), without decoding pixels, and
    check every label.

    Raises:
        ValueError: naming the first files that are no images, or a label outside the classes.
    """
    undecoded = dataset.cast_column("image", datasets.Image(decode=False))
    broken = []
    for index in evenly_spaced(len(undecoded), limit):
        item = undecoded[index]["image"]
        try:
            source = item["path"] if item["bytes"] is None else io.BytesIO(item["bytes"])
            with PIL.Image.open(source):
                pass
        except (OSError, TypeError, AttributeError, PIL.Image.DecompressionBombError) as error:
            name = (item or {}).get("path") or f"row {index}"
            broken.append(f"{name} ({type(error).__name__})")
    if broken:
        shown = ", ".join(broken[:5])
        raise ValueError(
            f"{len(broken)} files of the dataset are no readable images: {shown}. Remove or replace them."
        )
    num_classes = dataset.features["label"].num_classes
    bad_labels = [label for label in set(undecoded["label"]) if label is None or not 0 <= label < num_classes]
    if bad_labels:
        raise ValueError(f"Labels {bad_labels[:5]} lie outside the {num_classes} classes of the `label` column.")


class ProcessedImages(Dataset):
    """
    Items `{"pixel_values": (channels, height, width), "labels": int}` from a dataset with `image` and `label`.

    The randomness of an augmentation depends on `seed`, epoch and index only. So a resumed run, another number of
    workers or of processes sees the same pictures. Whole batches are processed at once.

    Args:
        dataset (`datasets.Dataset`): with columns `image` (PIL) and `label`.
        image_processor: a Hugging Face image processor.
        augmentation (`Callable`, *optional*): from a PIL image to a PIL image; none for evaluation.
        seed (`int`, *optional*, defaults to 0): of the augmentation.
    """

    def __init__(self, dataset, image_processor, augmentation: Callable | None = None, seed: int = 0):
        self.dataset, self.image_processor = dataset, image_processor
        self.augmentation, self.seed, self.epoch = augmentation, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Other random augmentations in each epoch (see [`AugmentationEpoch`])."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[dict]:
        rows = self._read(indices)
        pairs = zip(rows["image"], indices, strict=True)
        images = [self._augment(to_rgb(image), index) for image, index in pairs]
        pixel_values = self.image_processor(images, return_tensors="pt")["pixel_values"]
        return [
            {"pixel_values": image, "labels": label} for image, label in zip(pixel_values, rows["label"], strict=True)
        ]

    def _read(self, indices: list[int]) -> dict:
        try:
            return self.dataset[indices]
        except OSError as error:
            # datasets and Pillow do not say which file it was.
            undecoded = self.dataset.cast_column("image", datasets.Image(decode=False))
            for index in indices:
                try:
                    self.dataset[index]
                except OSError:
                    name = undecoded[index]["image"]["path"] or f"row {index}"
                    raise OSError(f"Image {name} cannot be decoded ({error}). Remove or replace it.") from error
            raise

    def _augment(self, image: PIL.Image.Image, index: int) -> PIL.Image.Image:
        if self.augmentation is None:
            return image
        with fixed_randomness(random.Random(f"{self.seed}-{self.epoch}-{index}").getrandbits(32)):
            return self.augmentation(image)


def to_rgb(image: PIL.Image.Image) -> PIL.Image.Image:
    """An 8-bit RGB image from one of any mode; 16 bits a pixel are scaled (Pillow alone would clip them to white)."""
    if image.mode.startswith("I;16"):
        image = PIL.Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return image.convert("RGB")


class RandomShift:
    """Augmentation: shift a picture by up to `padding` pixels in each direction; the edge colour fills the gap."""

    def __init__(self, padding: int):
        self.padding = padding

    def __call__(self, image: PIL.Image.Image) -> PIL.Image.Image:
        from torchvision.transforms import RandomCrop

        return RandomCrop((image.height, image.width), padding=self.padding, padding_mode="edge")(image)


class AugmentationEpoch(TrainerCallback):
    """Tells a [`ProcessedImages`] the epoch. The Trainer's dataloader does so in one process, but not in several."""

    def __init__(self, images: "ProcessedImages"):
        self.images = images

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.images.set_epoch(int((state.epoch or 0) + 1e-6))


def collate(items: list[Mapping]) -> dict[str, torch.Tensor]:
    """Batch of items: `pixel_values` `(batch, channels, height, width)` and `labels` `(batch,)`."""
    return {
        "pixel_values": torch.stack([item["pixel_values"] for item in items]),
        "labels": torch.tensor([item["labels"] for item in items]),
    }
