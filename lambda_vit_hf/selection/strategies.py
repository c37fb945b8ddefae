"""Ways to choose attention layers: NOSE, wider searches, and the simple rules they are compared with.

A strategy is a function from an [`AttentionSearch`] to layers, in the order picked.
"""

import itertools
import math
import random
from collections.abc import Callable, Sequence

from .search import NUM_FOLDS, AttentionSearch


MOST_SETS = 5000
RACE_FOLDS = tuple(range(NUM_FOLDS * eighths // 8) for eighths in (1, 2, 4, 6))
FEWEST_IMAGES = 128  # for a race that starts on an eighth of them


def nose(search: AttentionSearch) -> list[int]:
    """
    Entropy-based selection (paper, algorithm 1): greedy, least transfer entropy of the whole set at each step.

    The way is foreseen first, from the candidates that are in the running. What is left to measure along it, mostly of
    candidates that are not, is then measured for all steps at once, as their sets share blocks. Every pick is made on
    all images and all candidates, so what was foreseen cannot change the choice, only its cost.
    """
    order: list[int] = []
    while len(order) < search.num_layers:
        way = foresee(search, order)
        ahead = range(len(order), min(len(way) + 1, search.num_layers))
        search.measure(one for position in ahead for one in search.sets_with(way[:position]).values())
        while len(order) < search.num_layers and not search.unknown(search.sets_with(order).values()):
            order.append(search.pick(order, search.step(order)))
    return order


def foresee(search: AttentionSearch, order: Sequence[int]) -> list[int]:
    """
    `order`, gone on with by likely picks. Just `order` where there are too few images to foresee any, for the naive
    search, and for what cannot be read in parts (a stream, a `DataLoader`): each part would take a whole reading.
    """
    way = list(order)
    if not search.reuse_prefixes or not search.has_positions or search.num_images < FEWEST_IMAGES:
        return way
    while len(way) < search.num_layers:
        way.append(likely_pick(search, way))
    return way


def likely_pick(search: AttentionSearch, order: Sequence[int]) -> int:
    """
    The layer that a step of the search will most likely pick: a race, in which growing parts of the images, and all in
    the end, measure ever fewer candidates. Nothing new is measured where all candidates are known.
    """
    if not search.unknown(search.sets_with(order).values()):
        return search.least(search.step(order))
    running = list(search.sets_with(order))
    for folds in RACE_FOLDS:
        running = search.in_the_running(order, running, folds)
        if len(running) == 1:
            return running[0]
    return search.least(search.step(order, running))


def beam(width: int = 4) -> Callable[[AttentionSearch], list[int]]:
    """As [`nose`], but the `width` best sets are followed at each step; `beam(1)` is NOSE."""

    def beam_search(search: AttentionSearch) -> list[int]:
        orders: list[list[int]] = [[]]
        for _ in range(search.num_layers):
            longer = {
                frozenset([*order, layer]): [*order, layer]
                for order in orders
                for layer in search.candidates
                if layer not in order
            }
            values = search.transfer_entropy(list(longer))
            ranked = sorted(zip(values, longer.values(), strict=True), key=lambda pair: search.size(pair[0]))
            orders = [order for _, order in ranked[:width]]
        return orders[0]

    return beam_search


def exhaustive(search: AttentionSearch) -> list[int]:
    """
    The set of least transfer entropy among all.

    Raises:
        ValueError: if there are more than `MOST_SETS` sets.
    """
    number = math.comb(len(search.candidates), search.num_layers)
    if number > MOST_SETS:
        raise ValueError(f"{number:,} sets are too many to try (at most {MOST_SETS:,}): use 'nose' or 'beam'.")
    sets = list(itertools.combinations(search.candidates, search.num_layers))
    values = search.transfer_entropy(sets)
    return list(min(zip(values, sets, strict=True), key=lambda pair: search.size(pair[0]))[1])


def lowest_entropy(search: AttentionSearch) -> list[int]:
    """The layers whose own attention output has the least entropy."""
    return sorted(search.candidates, key=lambda layer: search.attention_entropy[layer])[: search.num_layers]


def cosine(search: AttentionSearch) -> list[int]:
    """The layers that turn the stream least (see [`CalibrationPasses.attention_influence`])."""
    influence = search.passes.attention_influence()
    return sorted(search.candidates, key=influence.__getitem__)[: search.num_layers]


def first(search: AttentionSearch) -> list[int]:
    """The layers nearest to the image."""
    return search.candidates[: search.num_layers]


def last(search: AttentionSearch) -> list[int]:
    """The layers nearest to the head."""
    return search.candidates[::-1][: search.num_layers]


def random_layers(search: AttentionSearch) -> list[int]:
    """Layers drawn with `seed`."""
    return random.Random(search.seed).sample(search.candidates, search.num_layers)


STRATEGIES: dict[str, Callable[[AttentionSearch], list[int]]] = {
    "nose": nose,
    "beam": beam(),
    "exhaustive": exhaustive,
    "lowest_entropy": lowest_entropy,
    "cosine": cosine,
    "first": first,
    "last": last,
    "random": random_layers,
}
