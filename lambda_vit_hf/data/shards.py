"""Datasets as streams, and how many images each of their shards holds."""

import hashlib

import datasets
import numpy as np


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
    note_sizes(stream, [size // num_shards + (index < size % num_shards) for index in range(num_shards)])
    return stream


def note_sizes(stream: datasets.IterableDataset, sizes: list[int]) -> None:
    """Notes for [`sizes_of_stream`] how many images each shard of a stream holds."""
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


def whole(stream: datasets.IterableDataset, source: str) -> datasets.Dataset:
    """A stream as a dataset on the disk, images as they are stored; kept in the cache of `datasets` under `source`."""
    for column, feature in stream.features.items():
        if isinstance(feature, datasets.Image):
            stream = stream.cast_column(column, datasets.Image(decode=False))
    fingerprint = hashlib.sha256(source.encode()).hexdigest()[:16]
    return datasets.Dataset.from_generator(
        _rows, features=stream.features, gen_kwargs={"stream": stream}, fingerprint=fingerprint
    )


def _rows(stream: datasets.IterableDataset):
    yield from stream
