"""The images that a training selects attention layers on, where it is given no others: its own."""

from torch.utils.data import DataLoader, Subset

from ..data.sampling import evenly_spaced, fixed_randomness


def images_of_training(train_dataloader: DataLoader, size: int | None, columns_are_removed: bool = False):
    """
    Training images, as training sees them, at a fixed random state, for [`select_attention_layers`].

    Args:
        train_dataloader (`DataLoader`): of the training images.
        size (`int`, *optional*): how many, spread over the dataset; `None`: all.
        columns_are_removed (`bool`, *optional*, defaults to `False`): the Trainer's `remove_unused_columns`.

    Raises:
        ValueError: on a streamed training set, or one whose images the Trainer has taken out.
    """
    dataset = train_dataloader.dataset
    if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
        raise ValueError("A streamed training set cannot be sampled: pass `calibration_dataset`.")
    if columns_are_removed:
        _check_first(dataset, train_dataloader.collate_fn)
    images = Subset(dataset, evenly_spaced(len(dataset), size))
    return _SameEveryPass(DataLoader(images, batch_size=64, collate_fn=train_dataloader.collate_fn))


def _check_first(dataset, collate) -> None:
    try:
        collate([dataset[0]])
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
