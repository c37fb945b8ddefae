"""Accuracy and throughput of an image classifier on a dataset, on any number of processes."""

import time
from collections.abc import Mapping, Sequence

import datasets
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, Dataset
from transformers import AutoConfig, AutoImageProcessor, EvalPrediction, PreTrainedModel

from ..data.dataset import LEFT_OUT, ProcessedImages, collate
from ..data.decoding import UnreadableImages
from ..data.folders import load_image_dataset
from ..data.sampling import evenly_spaced
from ..models.problem_type import REGRESSION, problem_type_of
from .metrics import classification_metrics, shortlist


def load_split(
    name: str | None = None, directory: str | None = None, split: str = "validation", **columns
) -> datasets.Dataset:
    """
    One split of a dataset, with an `image` and a `label` column.

    Args:
        name (`str`, *optional*): `"digits"`, or the id of a dataset on the Hub; or
        directory (`str`, *optional*): a local folder, as in [`load_image_dataset`].
        split (`str`, *optional*, defaults to `"validation"`): `"train"` or `"validation"` (a test split, where there
            is no other).
        columns: `config_name`, `image_column`, `label_column`, `train_dir`, `validation_dir` and `class_names` of
            [`load_image_dataset`].

    Raises:
        ValueError: if there is no such split.
    """
    loaded = load_image_dataset(name, directory, needed=split, **columns)
    if split not in loaded:
        raise ValueError(f"No split {split!r}; there are {list(loaded)}.")
    return loaded[split]


def read_images(dataset: datasets.Dataset, image_processor) -> ProcessedImages:
    """The images of a split as a model takes them; one that cannot be decoded has the label -100."""
    # How many are too many is for the reader of the figures to say: they are counted beside the accuracy.
    unreadable = UnreadableImages("skip", max_share=1.0)
    return ProcessedImages(dataset, image_processor, unreadable=unreadable, is_evaluation=True)


def processed_images(
    name: str | None = None,
    directory: str | None = None,
    image_processor=None,
    num_images: int = 256,
    split: str = "validation",
    **columns,
) -> torch.Tensor:
    """
    Some images of a split, evenly spaced, as one tensor `(images, channels, height, width)`; for `columns` see
    [`load_split`].
    """
    dataset = load_split(name, directory, split, **columns)
    return torch.stack([item["pixel_values"] for item in _some_items(dataset, image_processor, num_images)])


def labelled_images(
    model: str, name: str | None = None, directory: str | None = None, num_images: int = 256, **columns
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Some images of a validation split, evenly spaced, as `model`'s image processor makes them, and their labels in the
    order of its classes. Unreadable ones are left out. For `columns` see [`load_split`].
    """
    dataset = load_split(name, directory, **columns)
    config = AutoConfig.from_pretrained(model)
    check_has_classes(config)
    classes = class_indices(dataset.features["label"].names, config.id2label)
    items = _some_items(dataset, AutoImageProcessor.from_pretrained(model), num_images)
    items = [item for item in items if item["labels"] != LEFT_OUT]
    labels = torch.tensor([classes[item["labels"]] for item in items])
    return torch.stack([item["pixel_values"] for item in items]), labels


def _some_items(dataset: datasets.Dataset, image_processor, num_images: int) -> list[dict]:
    images = read_images(dataset, image_processor)
    return [images[index] for index in evenly_spaced(len(images), num_images)]


def check_has_classes(config) -> None:
    """
    Raises:
        ValueError: if the logits of a model with this config are values, or one: there is no best of them.
    """
    if problem_type_of(config) == REGRESSION or config.num_labels == 1:
        raise ValueError(
            f"The model gives values (`problem_type` {config.problem_type!r}, `num_labels` {config.num_labels}), not"
            " classes: it has no top-1."
        )


def class_indices(names: Sequence[str], id2label: Mapping[int, str], by_index: bool = False) -> list[int]:
    """
    The model's class index of each class of a dataset, found by name: the two may count them in different orders.

    Case, underscores and surrounding spaces do not matter. A model without names of its own (`LABEL_0`, ...) and with
    as many classes is taken to count as the dataset does.

    Args:
        names (`Sequence[str]`): the dataset's classes, in its order; all, or some, of the model's.
        id2label (`Mapping[int, str]`): the model's.
        by_index (`bool`, *optional*, defaults to `False`): both count in the same order, whatever the names.

    Raises:
        ValueError: if a class is unknown to the model, or its name fits several.
    """
    known = [id2label[index] for index in range(len(id2label))]
    unnamed = known == [f"LABEL_{index}" for index in range(len(known))] and len(names) == len(known)
    if list(names) == known or unnamed or by_index:
        if len(names) > len(known):
            raise ValueError(f"The dataset has {len(names)} classes, the model only {len(known)}.")
        return list(range(len(names)))
    places: dict[str, list[int]] = {}
    for index, name in enumerate(known):
        places.setdefault(_plain(name), []).append(index)
    doubtful = [name for name in names if len(places.get(_plain(name), [])) != 1]
    if doubtful or len({_plain(name) for name in names}) < len(names):
        raise ValueError(
            f"{len(doubtful)} of the dataset's {len(names)} classes have no (or no unique) namesake in the model:"
            f" {doubtful[:5]}; the model knows {known[:5]} and so on. If both count them in the same order, say so:"
            " --labels_by_index."
        )
    return [places[_plain(name)][0] for name in names]


def _plain(name: str) -> str:
    return str(name).replace("_", " ").strip().casefold()


@torch.inference_mode()
def evaluate_model(
    model: PreTrainedModel,
    images: Dataset,
    accelerator: Accelerator,
    classes: Sequence[int] | None = None,
    batch_size: int = 64,
    num_workers: int = 0,
) -> dict:
    """
    Top-1, top-5 and throughput. Every process of a distributed run must call it; all get the same accuracy.

    The images are shared out. Where their number does not divide, accelerate repeats some to fill the last batch;
    these are not counted.

    Args:
        model: from `pixel_values` to an output with `logits`.
        images (`Dataset`): map-style, items `{"pixel_values", "labels"}`; a label of -100 is an unreadable image.
        accelerator (`Accelerator`): knows processes and device.
        classes (`Sequence[int]`, *optional*): the model's index of each label (see [`class_indices`]).
        batch_size (`int`, *optional*, defaults to 64): per process.
        num_workers (`int`, *optional*, defaults to 0): processes that decode, per process.

    Returns:
        `dict`: `num_images` that were counted, `unreadable` ones left out, `accuracy` and (over five classes)
        `top5_accuracy` in [0, 1], `images_per_second` of the whole loop with decoding, `model_images_per_second` of
        the forward passes alone, both of all processes together.

    Raises:
        ValueError: if no image could be read.
    """
    loader = DataLoader(images, batch_size, collate_fn=collate, num_workers=num_workers)
    loader = accelerator.prepare(loader)
    model = model.to(accelerator.device).eval()
    renumber = None if classes is None else torch.tensor(classes, device=accelerator.device)
    all_scores, all_labels, model_seconds, model_images = [], [], [], []
    begin = time.perf_counter()
    for batch in loader:
        pixel_values, labels = batch["pixel_values"].to(model.dtype), batch["labels"]
        _synchronize(accelerator.device)
        start = time.perf_counter()
        scores = model(pixel_values).logits.float()
        _synchronize(accelerator.device)
        model_seconds.append(time.perf_counter() - start)
        model_images.append(len(pixel_values))
        if renumber is not None:
            labels = torch.where(labels == LEFT_OUT, labels, renumber[labels.clamp(min=0)])
        scores, labels = accelerator.gather_for_metrics(shortlist(scores, labels))
        all_scores.append(scores.cpu())
        all_labels.append(labels.cpu())
    seconds = time.perf_counter() - begin
    scores, labels = torch.cat(all_scores), torch.cat(all_labels)
    if len(labels) != len(images):
        raise RuntimeError(f"{len(labels)} predictions came together, of {len(images)} images.")
    readable = labels != LEFT_OUT
    if not readable.any():
        raise ValueError(f"None of the {len(images)} images could be read.")
    warm = slice(1, None) if len(model_seconds) > 1 else slice(None)
    own_speed = torch.tensor(sum(model_images[warm]) / sum(model_seconds[warm]), device=accelerator.device)
    return {
        "num_images": int(readable.sum()),
        "unreadable": int((~readable).sum()),
        **classification_metrics(EvalPrediction(scores[readable].numpy(), labels[readable].numpy())),
        "images_per_second": len(images) / seconds,
        "model_images_per_second": accelerator.reduce(own_speed, "sum").item(),
    }


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
