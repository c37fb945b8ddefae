"""Datasets as streams, and how many images each of their shards holds."""

import hashlib

import datasets
import numpy as np

from .labels import find_columns


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


def stream_from_hub(name: str, config_name: str | None) -> dict[str, datasets.Dataset | datasets.IterableDataset]:
    """Splits of a dataset on the Hub: `train` as a stream; `validation`, else `test`, whole, kept in the cache."""
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
