"""Training images from a stream: dealt out to processes and dataloader workers, shuffled, resumable at any batch."""

import collections
import functools
import itertools
import logging
import math
import random
from collections.abc import Callable, Iterator

import datasets
import fsspec.asyn
import torch
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from .dataset import ImagePreparation, ImagesOfEpochs, collate
from .decoding import MAX_PIXELS, UnreadableImages
from .sampling import dealt, shuffled
from .shards import sizes_of_stream


logger = logging.getLogger(__name__)

MAX_SHARDS = 4096  # a stream may have a shard for each of a million files: they are taken together
ROWS_AT_ONCE = 16


class StreamedImages(ImagesOfEpochs):
    """
    Training images from a `datasets.IterableDataset`; [`StreamedImages.loader`] reads them.

    What process `process_index` sees is a pure function of `seed`, epoch, number of processes and of workers, and
    batch size. In each epoch the shards are put in a new order and this long row of images is cut into one piece for
    each dataloader worker of each process; a worker reads its piece through a shuffle buffer.

    With `num_images` every process yields exactly `ceil(num_images / num_processes)` images an epoch, so that none
    waits for another for ever. Where the sizes of the shards are known (local files), every image is seen exactly once
    an epoch, but for up to `num_processes - 1` seen twice to come out even. Where they are not (the Hub), shards are
    taken to be of one size: a worker whose piece is shorter than that sees some images twice, from one whose piece is
    longer some are left out, other ones in each epoch. Without `num_images` the stream never ends and has no length.

    An image that cannot be decoded, where `unreadable` lets that pass, is replaced by the next one of the same worker.

    Args:
        stream (`datasets.IterableDataset`):
            With columns `image` (better undecoded: skipping is cheap then) and `label`, see
            [`~lambda_vit_hf.data.folders.load_image_dataset`]. Images sorted by class would need a very large buffer.
        image_processor, augmentation, unreadable, with_draws, max_pixels:
            See [`~lambda_vit_hf.data.dataset.ImagePreparation`].
        seed (`int`, *optional*, defaults to 0): of order and augmentation.
        buffer_size (`int`, *optional*, defaults to 1000):
            Undecoded images that each worker holds and picks from at random. ImageNet: 110 MB for 1000.
        num_images (`int`, *optional*): length of an epoch; `sizes_of_stream` may know it.
        process_index, num_processes (`int`, *optional*, default to 0 and 1): of the distributed run.

    Raises:
        ValueError: if an argument is out of its range, or there are fewer images than processes and workers.
    """

    def __init__(
        self,
        stream: datasets.IterableDataset,
        image_processor,
        augmentation: Callable | None = None,
        seed: int = 0,
        buffer_size: int = 1000,
        num_images: int | None = None,
        process_index: int = 0,
        num_processes: int = 1,
        unreadable: UnreadableImages | None = None,
        with_draws: bool = False,
        max_pixels: int = MAX_PIXELS,
    ):
        if not 0 <= process_index < num_processes:
            raise ValueError(f"Process {process_index} is none of {num_processes}.")
        if buffer_size < 1 or (num_images is not None and num_images < 1):
            raise ValueError(f"A buffer of {buffer_size} or a stream of {num_images} images is no use: at least 1.")
        super().__init__()
        self.stream, self.seed, self.buffer_size = stream, seed, buffer_size
        self.num_images, self.process_index, self.num_processes = num_images, process_index, num_processes
        self.num_classes = stream.features["label"].num_classes
        self.prepare = ImagePreparation(image_processor, augmentation, unreadable, with_draws, max_pixels)
        self.num_shards = min(stream.num_shards, MAX_SHARDS)
        known, sizes = sizes_of_stream(stream)
        self.shard_sizes = None
        if sizes is not None and known == num_images:
            self.shard_sizes = [sum(sizes[index :: self.num_shards]) for index in range(self.num_shards)]

    def __len__(self) -> int:
        """Images that this process sees in an epoch."""
        if self.num_images is None:
            raise TypeError("A stream without `num_images` has no length.")  # what torch and the Trainer understand
        return math.ceil(self.num_images / self.num_processes)

    def loader(self, batch_size: int, num_workers: int = 0, collate_fn: Callable = collate, **options) -> DataLoader:
        """
        A plain `DataLoader` of this process's batches. It needs no `accelerator.prepare`, and must not get it: each
        process has its own images already.

        To go on in mid-epoch, `accelerate.skip_first_batches(loader, n)`, as the Trainer does it, yields the rest to
        the bit, and reads the images before without decoding them. With another number of processes or workers, or
        another batch size, the order is another one: of this epoch some images are then seen twice and some not.

        Args:
            batch_size (`int`): images a batch, of this process.
            num_workers (`int`, *optional*, defaults to 0): dataloader worker processes.
            collate_fn (`Callable`, *optional*): see [`~lambda_vit_hf.data.dataset.collate`].
            options: further arguments of `DataLoader`, such as `pin_memory`, `prefetch_factor`, `persistent_workers`.
        """
        readers = self.num_processes * max(1, num_workers)
        if readers > self.num_shards and self.process_index == 0:
            logger.warning(
                f"{readers} processes and workers share {self.num_shards} shards: each reads whole shards and keeps a"
                " part. Fewer workers, or a dataset in more files, would read less."
            )
        return DataLoader(
            _Positions(self, batch_size, max(1, num_workers)),
            batch_size=batch_size,
            sampler=_Endless() if self.num_images is None else None,
            num_workers=num_workers,
            collate_fn=collate_fn,
            generator=torch.Generator().manual_seed(self.seed),  # else it would draw from the global one
            **options,
        )

    def rows(self, start: int, end: int, num_slices: int | None, epoch: int) -> Iterator[tuple[str, dict]]:
        """
        Endless names and undecoded rows: a piece of the stream in the order of an epoch, shuffled; then, for as long
        as more is asked for, the same piece of the stream in other orders.

        Args:
            start, end (`int`): of the piece, in rows where the sizes of shards are known, else in slices of shards.
            num_slices (`int`, *optional*): slices a shard, among which its rows are dealt at random.
            epoch (`int`): from 0.

        Raises:
            ValueError: if there is nothing in the piece.
        """
        if get_worker_info() is not None:
            fsspec.asyn.reset_lock()  # as `datasets` does: a forked worker would wait for a thread of its parent
        for turn in itertools.count():
            order = random.Random(f"{self.seed}-{epoch}-{turn}").sample(range(self.num_shards), self.num_shards)
            found = self._piece(order, start, end, num_slices)
            first = next(found, None)
            if first is None:
                raise ValueError("The stream has no image for one of the workers: use fewer processes and workers.")
            generator = random.Random(f"{self.seed}-{epoch}-{turn}-{start}")
            yield from shuffled(itertools.chain([first], found), self.buffer_size, generator)

    def _piece(self, order: list[int], start: int, end: int, num_slices: int | None) -> Iterator[tuple[str, dict]]:
        sizes = [num_slices] * self.num_shards if num_slices else self.shard_sizes
        before = 0
        for shard in order:
            low, high = max(start - before, 0), min(end - before, sizes[shard])
            before += sizes[shard]
            if low >= high:
                continue
            places = dealt(num_slices, f"{self.seed}-{shard}") if num_slices else itertools.count()
            for number, (place, row) in enumerate(zip(places, self._shard(shard), strict=False)):
                if low <= place < high:
                    yield f"row {number} of shard {shard}", row
                elif place >= high and not num_slices:
                    break

    def _shard(self, shard: int) -> Iterator[dict]:
        part = self.stream.shard(self.num_shards, shard, contiguous=False)
        # Not plain iteration: in a dataloader worker `datasets` would deal the shards out once more.
        for batch in part.iter(ROWS_AT_ONCE):
            for image, label in zip(batch["image"], batch["label"], strict=True):
                yield {"image": image, "label": label}


class _Positions(Dataset):
    """
    The epoch of one process by position. Batch after batch goes to the readers in turn, as a `DataLoader` deals them
    to its workers; so each worker meets one reader only, going forward, also when the first batches are skipped.
    """

    def __init__(self, images: StreamedImages, batch_size: int, num_readers: int):
        self.images, self.batch_size, self.num_readers = images, batch_size, num_readers
        self.readers: dict[tuple[int, int], _Reader] = {}

    def __len__(self) -> int:
        return len(self.images)

    def __getstate__(self):
        return {**self.__dict__, "readers": {}}  # a started worker begins its own

    def __getitem__(self, position: int) -> dict:
        return self.__getitems__([position])[0]

    def __getitems__(self, positions: list[int]) -> list[dict]:
        images, epoch = self.images, self.images.epoch
        pictures, labels, keys = [], [], []
        for position in positions:
            batch, place = divmod(position, self.batch_size)
            reader = self._reader(batch % self.num_readers, epoch)
            reader.go_to(batch // self.num_readers * self.batch_size + place)
            picture, label = self._first_readable(reader)
            pictures.append(picture)
            labels.append(label)
            keys.append(f"{images.seed}-{epoch}-{images.process_index}-{position}")
        return images.prepare(pictures, labels, keys)

    def _first_readable(self, reader: "_Reader"):
        for ahead in itertools.count():
            name, row = reader.look_ahead(ahead)
            picture = self.images.prepare.decode(row["image"], name)
            if picture is not None:
                label = row["label"]
                if label is None or not 0 <= label < self.images.num_classes:
                    raise ValueError(f"Label {label} of {name} lies outside the {self.images.num_classes} classes.")
                return picture, label

    def _reader(self, number: int, epoch: int) -> "_Reader":
        if (number, epoch) not in self.readers:
            self.readers = {key: reader for key, reader in self.readers.items() if key[1] == epoch}
            rows = functools.partial(self.images.rows, *self._piece(number), epoch)
            self.readers[number, epoch] = _Reader(rows)
        return self.readers[number, epoch]

    def _piece(self, number: int) -> tuple[int, int, int | None]:
        """Arguments of [`StreamedImages.rows`] for a reader of this process."""
        images = self.images
        if not images.shard_sizes:
            num_pieces = images.num_processes * self.num_readers
            piece = images.process_index * self.num_readers + number
            num_slices = 1 if images.num_shards % num_pieces == 0 else num_pieces
            edges = (edge * images.num_shards * num_slices // num_pieces for edge in (piece, piece + 1))
            return *edges, num_slices
        # Exactly the images that will be asked of this reader: every `num_readers`-th batch, and the rest of one.
        full, rest = divmod(len(images), self.batch_size)
        counts = [len(range(reader, full, self.num_readers)) * self.batch_size for reader in range(self.num_readers)]
        counts[full % self.num_readers] += rest
        start = images.process_index * len(images) + sum(counts[:number])
        beyond = max(0, start + counts[number] - images.num_images)  # what the last ones see for the second time
        return start - beyond, start - beyond + counts[number], None


class _Reader:
    """A place in an endless sequence of rows, which goes forward cheaply and backward by starting anew."""

    def __init__(self, start: Callable[[], Iterator]):
        self.start = start
        self.restart()

    def restart(self) -> None:
        self.position, self.ahead, self.rows = 0, collections.deque(), self.start()

    def go_to(self, position: int) -> None:
        if position < self.position:
            self.restart()
        while self.position < position:
            self.look_ahead(0)
            self.ahead.popleft()
            self.position += 1

    def look_ahead(self, steps: int):
        while len(self.ahead) <= steps:
            self.ahead.append(next(self.rows))
        return self.ahead[steps]


class _Endless(Sampler):
    def __iter__(self) -> Iterator[int]:
        return itertools.count()


def sample_of_stream(stream: datasets.IterableDataset, size: int, seed: int = 0) -> datasets.Dataset:
    """`size` random images of a stream (fewer, if it has fewer) as a dataset in memory, for calibration."""
    images = StreamedImages(stream, image_processor=None, seed=seed, buffer_size=max(1, 2 * size))
    order = random.Random(seed).sample(range(images.num_shards), images.num_shards)
    rows = shuffled(images._piece(order, 0, images.num_shards, 1), images.buffer_size, random.Random(seed))
    features = datasets.Features({"image": datasets.Image(), "label": stream.features["label"]})
    found = [row for _, row in itertools.islice(rows, size)]
    return datasets.Dataset.from_dict(
        {"image": [row["image"] for row in found], "label": [row["label"] for row in found]}, features=features
    )
