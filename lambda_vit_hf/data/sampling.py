"""Which images of many, and random numbers that start from a known state."""

import contextlib
import random
from collections.abc import Iterable, Iterator

import numpy as np
import torch


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


def evenly_spaced(num_items: int, size: int | None, seed: int = 0) -> list[int]:
    """
    `size` indices spread over `range(num_items)`, all of them if there are fewer: one at random from each of `size`
    equal parts. Covers classes that come one after the other, and those that take turns: every k-th index would not.

    Args:
        num_items (`int`): to choose from.
        size (`int`, *optional*): by default all.
        seed (`int`, *optional*, defaults to 0): the same seed gives the same indices.
    """
    if size is None or size >= num_items:
        return list(range(num_items))
    edges = np.arange(size + 1) * num_items // size
    return np.random.default_rng(seed).integers(edges[:-1], edges[1:]).tolist()


def balanced_folds(num_items: int, num_folds: int, seed: int = 0) -> torch.Tensor:
    """
    The fold `(num_items,)` of each item: of every `num_folds` items in a row each goes to another fold, at random. It
    does not depend on how many items follow.
    """
    draws = np.random.default_rng(seed).random((-(-num_items // num_folds), num_folds))
    return torch.from_numpy(draws.argsort(axis=1).ravel()[:num_items])


def dealt(num_slices: int, seed: str) -> Iterator[int]:
    """Slices of rows one after another, each once in every `num_slices` rows: classes that take turns are mixed."""
    generator = random.Random(seed)
    while True:
        yield from generator.sample(range(num_slices), num_slices)


def shuffled(rows: Iterable, buffer_size: int, generator: random.Random) -> Iterator:
    """Rows in another order: each is drawn from a buffer that the next ones refill."""
    buffer = []
    for row in rows:
        if len(buffer) < buffer_size:
            buffer.append(row)
        else:
            place = generator.randrange(buffer_size)
            buffer[place], row = row, buffer[place]
            yield row
    generator.shuffle(buffer)
    yield from buffer
