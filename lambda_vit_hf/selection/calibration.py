"""Calibration images, in whatever form a user has them, as batches of pixel values."""

import contextlib
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence

import PIL.Image
import torch
from torch.utils.data import DataLoader

from ..data.decoding import decode_image, undecoded
from ..data.sampling import balanced_folds, fixed_randomness


class CalibrationBatches:
    """
    Batches of pixel values that can be gone through many times, whole or in parts.

    Images are dealt out to folds at random, evenly along the set ([`~lambda_vit_hf.data.sampling.balanced_folds`]). So
    every fold is a fair sample, also of images whose classes are sorted or take turns, and is the same at every
    reading and for every batch size. Random numbers of Python, numpy and torch start from the same state at every
    reading: a shuffled or augmenting `DataLoader` gives the same images in the same order again.

    Args:
        images (`torch.Tensor`, `DataLoader`, dataset or list):
            A tensor `(images, channels, height, width)`; a `DataLoader` or list of such tensors, or of dicts with
            `"pixel_values"`; a dataset, list or stream (`datasets.IterableDataset`, torch's) of single images: 3-d
            tensors, dicts with 3-d `"pixel_values"`, or, with `image_processor`, pictures (`PIL.Image`, or dicts with
            one at `"image"`). Whatever has positions is read in parts; a stream or `DataLoader` from its beginning.
        batch_size (`int`, *optional*, defaults to 64):
            Images per batch, where `images` is not batched already.
        image_processor (*optional*): Hugging Face image processor, where `images` are pictures.
        num_folds (`int`, *optional*, defaults to 1): parts that can be read apart.

    Attributes:
        num_images (`int`): how many there are; of a stream, known after the first reading.

    Raises:
        ValueError: if there are no images, or if `images` is an iterator that can be read only once.
        TypeError: if an item holds no pixel values.
    """

    def __init__(self, images: Iterable, batch_size: int = 64, image_processor=None, num_folds: int = 1):
        if isinstance(images, Iterator):
            raise ValueError(
                "The calibration set is read several times, but an iterator can be read only once."
                " Pass the dataset or DataLoader itself, or a list."
            )
        if hasattr(images, "__len__") and len(images) == 0:
            raise ValueError("The calibration set is empty: at least one image is needed.")
        if isinstance(images, Mapping):
            raise TypeError(f"Expected many images, got one batch with {sorted(images)}: put it in a list.")
        if isinstance(images, torch.Tensor) and images.ndim != 4:
            raise TypeError(f"Expected a batch of images in 4 dimensions, got shape {tuple(images.shape)}.")
        images = undecoded(images)
        self.images, self.batch_size, self.image_processor = images, batch_size, image_processor
        self.num_folds = num_folds
        self.has_positions = (
            hasattr(images, "__getitem__") and hasattr(images, "__len__") and self._pixel_values(images[0]).ndim == 3
        )
        self.num_images = len(images) if self.has_positions else 0

    def __iter__(self) -> Iterator[torch.Tensor]:
        """Yields tensors `(batch, channels, height, width)` of all images."""
        for pixel_values, _ in self.read(range(self.num_folds)):
            yield pixel_values

    def read(
        self, folds: Sequence[int], rank: int = 0, num_processes: int = 1
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """
        Yields batches `(batch, channels, height, width)` of the images of some folds, with the fold of each image,
        `(batch,)`. Of several processes each gets every `num_processes`-th batch; the last one may be ragged. Where
        images have positions, batches are small enough to go round.
        """
        with fixed_randomness(0), _generators_put_back(self.images):
            if self.has_positions:
                batches = self._read_positions(folds, rank, num_processes)
            else:
                batches = itertools.islice(self._read_through(folds), rank, None, num_processes)
            yield from batches
        if not self.num_images:
            raise ValueError("The calibration set is empty: at least one image is needed.")

    def _read_positions(self, folds: Sequence[int], rank: int, num_processes: int) -> Iterator:
        fold_of = balanced_folds(self.num_images, self.num_folds)
        positions = [n for n, fold in enumerate(fold_of.tolist()) if fold in folds]
        size = min(self.batch_size, -(-len(positions) // num_processes) or 1)  # of few images each process gets some
        batches = [positions[start : start + size] for start in range(0, len(positions), size)]
        batches = batches[rank::num_processes]
        if isinstance(self.images, torch.Tensor):
            read = (self.images[batch] for batch in batches)
        else:
            read = DataLoader(self.images, batch_sampler=batches, collate_fn=self._stack)
        for batch, pixel_values in zip(batches, read, strict=True):
            yield pixel_values, fold_of[batch]

    def _read_through(self, folds: Sequence[int]) -> Iterator:
        waiting, num_waiting, num_read, batch_size = [], 0, 0, 0
        for item in self.images:
            pixel_values = self._pixel_values(item)
            if pixel_values.ndim == 3:
                pixel_values, batch_size = pixel_values[None], self.batch_size
            if pixel_values.ndim != 4:
                raise TypeError(f"Expected a batch of images in 4 dimensions, got shape {tuple(pixel_values.shape)}.")
            batch_size = batch_size or len(pixel_values)
            fold_of = balanced_folds(num_read + len(pixel_values), self.num_folds)[num_read:]
            num_read += len(pixel_values)
            wanted = torch.isin(fold_of, torch.tensor(list(folds)))
            waiting.append((pixel_values[wanted], fold_of[wanted]))
            num_waiting += int(wanted.sum())
            if num_waiting >= batch_size:
                yield tuple(torch.cat(parts) for parts in zip(*waiting, strict=True))
                waiting, num_waiting = [], 0
        if num_waiting:
            yield tuple(torch.cat(parts) for parts in zip(*waiting, strict=True))
        self.num_images = num_read

    def _stack(self, items: list) -> torch.Tensor:
        return torch.stack([self._pixel_values(item) for item in items])

    def _pixel_values(self, item) -> torch.Tensor:
        if isinstance(item, (tuple, list)) and item:
            item = item[0]
        if isinstance(item, torch.Tensor):
            return item
        picture = item.get("image") if isinstance(item, Mapping) and "pixel_values" not in item else item
        if isinstance(picture, PIL.Image.Image) or (isinstance(picture, Mapping) and "bytes" in picture):
            if self.image_processor is None:
                raise TypeError("Calibration images are pictures: pass the model's `image_processor` too.")
            return self.image_processor(decode_image(picture), return_tensors="pt")["pixel_values"][0]
        try:
            return torch.as_tensor(item["pixel_values"])
        except (KeyError, TypeError, IndexError):
            found = sorted(item) if hasattr(item, "keys") else type(item).__name__
            raise TypeError(f"A calibration item needs `pixel_values`, got {found}.") from None


@contextlib.contextmanager
def _generators_put_back(images):
    """A `DataLoader`'s own random generators are, after a reading, where they were before it."""
    owners = (images, getattr(images, "sampler", None))
    generators = [
        owner.generator for owner in owners if isinstance(getattr(owner, "generator", None), torch.Generator)
    ]
    states = [generator.get_state() for generator in generators]
    try:
        yield
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)


class SameImages:
    """
    Notices when images are not the same at every reading: moments of different images would not add up.

    Args:
        num_folds (`int`): of the calibration images.
    """

    def __init__(self, num_folds: int):
        self.num_folds = num_folds
        self.known: dict[int, tuple[float, float]] = {}
        self.forget()

    def forget(self) -> None:
        """Before a reading."""
        self.sums = torch.zeros(self.num_folds, 2, dtype=torch.float64)

    def add(self, pixel_values: torch.Tensor, folds: torch.Tensor) -> None:
        """A batch `(batch, channels, height, width)` of a reading, and the fold of each image."""
        flat = pixel_values.detach().cpu().double().flatten(1)
        ramp = torch.linspace(1, 2, flat.shape[1], dtype=torch.float64)  # mirrored images are other images
        self.sums.index_add_(0, folds.cpu(), torch.stack([flat @ ramp, flat.abs() @ ramp], dim=1))

    def check(self, folds: Sequence[int]) -> None:
        """
        After a reading of whole folds.

        Raises:
            ValueError: if a fold differs from an earlier reading of it.
        """
        for fold in folds:
            now = tuple(self.sums[fold].tolist())
            then = self.known.setdefault(fold, now)
            if any(abs(a - b) > 1e-9 * max(now[1], then[1]) for a, b in zip(now, then, strict=True)):
                raise ValueError(
                    "The calibration images differ from one reading to the next. Pass them without random"
                    " augmentation, or as a `DataLoader`, whose random numbers start anew at every reading."
                )
