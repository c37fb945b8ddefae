"""Calibration images, in whatever form a user has them, as batches of pixel values."""

import contextlib
import random
from collections.abc import Iterable, Iterator, Mapping

import numpy as np
import torch
from torch.utils.data import DataLoader


@contextlib.contextmanager
def fixed_randomness(seed: int):
    """Python's, numpy's and torch's (CPU) random numbers start from `seed` inside, and go on undisturbed after."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        try:
            random.seed(seed)
            np.random.seed(seed % 2**32)
            torch.default_generator.manual_seed(seed)  # torch.manual_seed would restart the GPUs' generators too
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)


def evenly_spaced(num_items: int, size: int | None) -> list[int]:
    """`size` indices spread over `range(num_items)`, all of them if there are fewer: covers sorted classes too."""
    if size is None or size >= num_items:
        return list(range(num_items))
    return [index * num_items // size for index in range(size)]


class CalibrationBatches:
    """
    Batches of pixel values that can be gone through many times.

    Args:
        images (`torch.Tensor`, `DataLoader`, dataset or list):
            A tensor `(images, channels, height, width)`; a `DataLoader` or list of such tensors, or of dicts with
            `"pixel_values"`; a map-style dataset (`datasets.Dataset` or torch) whose items are 3-d tensors or dicts
            with 3-d `"pixel_values"`.
        batch_size (`int`, *optional*, defaults to 64):
            Images per batch, where `images` is not batched already.

    Raises:
        ValueError: if there are no images, or if `images` is an iterator that can be read only once.
        TypeError: if an item holds no pixel values.
    """

    def __init__(self, images: Iterable, batch_size: int = 64):
        if isinstance(images, Iterator):
            raise ValueError(
                "The calibration set is read several times, but an iterator can be read only once."
                " Pass the dataset or DataLoader itself, or a list."
            )
        if hasattr(images, "__len__") and len(images) == 0:
            raise ValueError("The calibration set is empty: at least one image is needed.")
        if isinstance(images, torch.Tensor):
            images = images.split(batch_size)
        elif isinstance(images, Mapping):
            raise TypeError(f"Expected many images, got one batch with {sorted(images)}: put it in a list.")
        elif hasattr(images, "__getitem__") and hasattr(images, "__len__") and _pixel_values(images[0]).ndim == 3:
            images = DataLoader(images, batch_size=batch_size, collate_fn=_stack_pixel_values)
        self.batches = images
        self.num_batches, self.num_images = 0, 0

    def __iter__(self) -> Iterator[torch.Tensor]:
        """Yields tensors `(batch, channels, height, width)`; afterwards `num_batches` and `num_images` are known."""
        num_batches, num_images = 0, 0
        for batch in self.batches:
            pixel_values = _pixel_values(batch)
            if pixel_values.ndim != 4:
                raise TypeError(f"Expected a batch of images in 4 dimensions, got shape {tuple(pixel_values.shape)}.")
            num_batches, num_images = num_batches + 1, num_images + len(pixel_values)
            yield pixel_values
        self.num_batches, self.num_images = num_batches, num_images
        if not num_images:
            raise ValueError("The calibration set is empty: at least one image is needed.")


def _pixel_values(item) -> torch.Tensor:
    if isinstance(item, (tuple, list)) and item:
        item = item[0]
    if not isinstance(item, torch.Tensor):
        try:
            item = item["pixel_values"]
        except (KeyError, TypeError, IndexError):
            found = sorted(item) if hasattr(item, "keys") else type(item).__name__
            raise TypeError(f"A calibration item needs `pixel_values`, got {found}.") from None
    return torch.as_tensor(item)


def _stack_pixel_values(items: list) -> torch.Tensor:
    return torch.stack([_pixel_values(item) for item in items])
