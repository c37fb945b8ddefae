"""Which images of many, and random numbers that start from a known state."""

import contextlib
import random

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


def evenly_spaced(num_items: int, size: int | None) -> list[int]:
    """`size` indices spread over `range(num_items)`, all of them if there are fewer: covers sorted classes too."""
    if size is None or size >= num_items:
        return list(range(num_items))
    return [index * num_items // size for index in range(size)]
