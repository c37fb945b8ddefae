"""Calibration images, in whatever form a user has them, as batches of pixel values."""

import tempfile
from collections.abc import Iterable, Iterator, Mapping

import numpy as np
import PIL.Image
import torch
from torch.utils.data import IterableDataset, Subset
from tqdm.auto import tqdm

from ..data.decoding import decode_image, undecoded
from ..data.sampling import balanced_folds, evenly_spaced, fixed_randomness
from .processes import rank_and_num_processes


class CalibrationBatches:
    """
    Batches of pixel values that can be gone through many times.

    Images are read once, at the start, and kept in a temporary file (0.6 MB for a float32 image of 224 px); a tensor
    is used as it is. So every pass sees the same images, also those of a shuffled or augmenting `DataLoader`, and
    memory does not grow with their number. Of several processes each has every so many-th image.

    Args:
        images (`torch.Tensor`, `DataLoader`, dataset or list):
            A tensor `(images, channels, height, width)`; a `DataLoader` or list of such tensors, or of dicts with
            `"pixel_values"`; a dataset, list or stream (`datasets.IterableDataset`, torch's) of single images: 3-d
            tensors, dicts with 3-d `"pixel_values"`, or, with `image_processor`, pictures (`PIL.Image`, or dicts with
            one at `"image"`). Python's, numpy's and torch's random numbers start from a fixed state.
        batch_size (`int`, *optional*, defaults to 64):
            Images per batch, where `images` is not batched already.
        image_processor (*optional*): Hugging Face image processor, where `images` are pictures.
        num_folds (`int`, *optional*, defaults to 1): parts whose moments are kept apart.
        size (`int`, *optional*): take this many, evenly spaced, of a dataset with positions; by default all.
        bar (`tqdm`, *optional*): moved on by the images read.

    Attributes:
        num_images, num_own_images (`int`): how many there are, of all processes and of this one.

    Raises:
        ValueError: if there are no images, or images of several shapes.
        TypeError: if an item holds no pixel values.
    """

    def __init__(
        self,
        images: Iterable,
        batch_size: int = 64,
        image_processor=None,
        num_folds: int = 1,
        size: int | None = None,
        bar: tqdm | None = None,
    ):
        if isinstance(images, Mapping):
            raise TypeError(f"Expected images, got a dict of {sorted(images)}: pass one split, or a batch in a list.")
        if isinstance(images, torch.Tensor) and images.ndim != 4:
            raise TypeError(f"Expected a batch of images in 4 dimensions, got shape {tuple(images.shape)}.")
        self.batch_size, self.image_processor, self.num_folds = batch_size, image_processor, num_folds
        self._rank, self._num_processes = rank_and_num_processes()
        self.num_images = 0
        bar = tqdm(disable=True) if bar is None else bar
        with fixed_randomness(0):
            self._own_images, positions = self._read(undecoded(images), size, bar)
        self._folds = balanced_folds(self.num_images, num_folds)[positions]
        self.num_own_images = len(positions)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yields this process's images, `(batch, channels, height, width)`, and the fold of each, `(batch,)`."""
        for start in range(0, self.num_own_images, self.batch_size):
            batch = slice(start, start + self.batch_size)
            yield self._own_images[batch], self._folds[batch]

    def _read(self, images, size: int | None, bar: tqdm) -> tuple[torch.Tensor, torch.Tensor]:
        """This process's images, and the position of each among all."""
        has_positions = hasattr(images, "__getitem__") and hasattr(images, "__len__")
        if not has_positions or isinstance(images, IterableDataset) or len(images) == 0:
            return keep_in_file(self._read_through(images), bar)
        if not isinstance(images, (torch.Tensor, list, tuple)):
            images = Subset(images, evenly_spaced(len(images), size))
        if self._pixel_values(images[0]).ndim != 3:
            return keep_in_file(self._read_through(images), bar)
        self.num_images = len(images)
        own = torch.tensor(range(self._rank, self.num_images, self._num_processes), dtype=torch.long)
        if isinstance(images, torch.Tensor):
            return images[self._rank :: self._num_processes], own
        bar.reset(total=len(own))
        return keep_in_file(((self._read_one(images, int(n))[None], n[None]) for n in own), bar)

    def _read_one(self, images, position: int) -> torch.Tensor:
        with fixed_randomness(position):  # so augmentation does not depend on what else this process reads
            return self._pixel_values(images[position])

    def _read_through(self, images: Iterable) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for item in images:
            pixel_values = self._pixel_values(item)
            if pixel_values.ndim == 3:
                pixel_values = pixel_values[None]
            elif pixel_values.ndim != 4:
                raise TypeError(f"Expected a batch of images in 4 dimensions, got shape {tuple(pixel_values.shape)}.")
            elif self.num_images == 0:
                self.batch_size = len(pixel_values)
            positions = torch.arange(self.num_images, self.num_images + len(pixel_values))
            self.num_images += len(positions)
            own = positions % self._num_processes == self._rank
            yield pixel_values[own], positions[own]
        if not self.num_images:
            raise ValueError("The calibration set is empty: at least one image is needed.")

    def _pixel_values(self, item) -> torch.Tensor:
        if isinstance(item, (tuple, list)) and item:
            item = item[0]
        if isinstance(item, torch.Tensor):
            return item
        picture = item.get("image") if isinstance(item, Mapping) and "pixel_values" not in item else item
        if isinstance(picture, PIL.Image.Image) or (isinstance(picture, Mapping) and "bytes" in picture):
            if self.image_processor is None:
                raise TypeError(
                    "Calibration images are pictures: pass the model's `image_processor` too (to a Trainer, as its"
                    " `processing_class`)."
                )
            return self.image_processor(decode_image(picture), return_tensors="pt")["pixel_values"][0]
        try:
            return torch.as_tensor(item["pixel_values"])
        except (KeyError, TypeError, IndexError):
            found = sorted(item) if hasattr(item, "keys") else type(item).__name__
            raise TypeError(f"A calibration item needs `pixel_values`, got {found}.") from None


def keep_in_file(parts: Iterable[tuple[torch.Tensor, torch.Tensor]], bar: tqdm) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Images and positions of all parts, each as one tensor; that of the images lies in a temporary file, which goes
    with it.

    Raises:
        ValueError: if images differ in shape or dtype.
    """
    kinds, positions = set(), [torch.empty(0, dtype=torch.long)]
    with tempfile.TemporaryFile() as file:
        for pixel_values, of_images in parts:
            kinds.add((tuple(pixel_values.shape[1:]), pixel_values.dtype))
            if len(kinds) > 1:
                raise ValueError(f"Calibration images must have one shape and dtype, got {sorted(kinds, key=str)}.")
            positions.append(of_images)
            pixel_values.detach().cpu().contiguous().view(torch.uint8).numpy().tofile(file)
            bar.update(len(pixel_values))
        if file.tell() == 0:  # fewer images than processes
            return torch.empty(0), torch.cat(positions)
        kept = torch.from_numpy(np.memmap(file, dtype=np.uint8, mode="r+"))
    ((shape, dtype),) = kinds
    return kept.view(dtype).view(-1, *shape), torch.cat(positions)
