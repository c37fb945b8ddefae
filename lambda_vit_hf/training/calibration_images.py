"""The images that a training selects attention layers on: those it is given, or its own."""

import torch
from torch.utils.data import DataLoader, Subset

from ..data.sampling import evenly_spaced, fixed_randomness


def calibration_images(given, size: int | None, train_dataloader: DataLoader, columns_are_removed: bool = False):
    """
    Images in a form that [`select_attention_layers`] takes.

    Args:
        given (*optional*): calibration images of the user, in any of these forms; `None`: the training images, as
            training sees them, at a fixed random state.
        size (`int`, *optional*): how many, evenly spaced, of a dataset.
        train_dataloader (`DataLoader`): of the training images.
        columns_are_removed (`bool`, *optional*, defaults to `False`): the Trainer's `remove_unused_columns`.

    Raises:
        ValueError: on a streamed training set, or one whose images the Trainer has taken out.
    """
    if given is None:
        dataset = train_dataloader.dataset
        if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
            raise ValueError("A streamed training set cannot be sampled: pass `calibration_dataset`.")
        if columns_are_removed:
            _check_first(dataset)
        images = Subset(dataset, evenly_spaced(len(dataset), size))
        return _SameEveryPass(DataLoader(images, batch_size=64, collate_fn=train_dataloader.collate_fn))
    is_dataset = hasattr(given, "__getitem__") and hasattr(given, "__len__")
    if is_dataset and not isinstance(given, (list, torch.Tensor)):
        return Subset(given, evenly_spaced(len(given), size))
    return given


def _check_first(dataset) -> None:
    try:
        dataset[0]
    except KeyError as error:
        raise ValueError(
            f"The training images lack the column {error}: the Trainer takes out what the model's forward does not"
            " name. Use TrainingArguments(remove_unused_columns=False)."
        ) from error


class _SameEveryPass:
    """A DataLoader whose random augmentations come out the same on every pass."""

    def __init__(self, dataloader: DataLoader):
        self.dataloader = dataloader

    def __len__(self) -> int:
        return len(self.dataloader)

    def __iter__(self):
        with fixed_randomness(0):
            yield from self.dataloader
