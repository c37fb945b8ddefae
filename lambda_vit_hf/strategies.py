"""Ways to choose attention layers: NOSE, wider searches, and the simple rules they are compared with.

A strategy is a function from an [`AttentionSearch`] to layers, in the order picked.
"""

import itertools
import math
import random
from collections.abc import Callable

from .masking import count_blocks
from .search import AttentionSearch


MOST_SETS = 5000
GUESS_FOLDS = range(4)
FEWEST_IMAGES = 256  # to guess from an eighth of them


def nose(search: AttentionSearch) -> list[int]:
    """
    Entropy-based selection (paper, algorithm 1): greedy, least transfer entropy of the whole set at each step.

    The way is guessed on an eighth of the images. A pass over all images then measures later steps of the guess along
    with the present one, where that is likely to save more than it costs: sets that share layers share blocks. Every
    pick is made on all images, so the guess cannot change the choice.
    """
    guess, certainty = guess_order(search)
    order: list[int] = []
    while len(order) < search.num_layers:
        search.measure(worth_measuring(search, order, guess, certainty))
        while len(order) < search.num_layers and not search.unknown(search.sets_with(order).values()):
            order.append(search.pick(order, search.step(order)))
    return order


def guess_order(search: AttentionSearch) -> tuple[list[int], list[float]]:
    """NOSE on `GUESS_FOLDS` folds, and how stable each pick is there; nothing where there are too few images."""
    order: list[int] = []
    certainty: list[float] = []
    if not search.reuse_prefixes or search.num_images < FEWEST_IMAGES:
        return order, certainty
    while len(order) < search.num_layers:
        layer = search.least(search.step(order, GUESS_FOLDS))
        resampled = search.resampled_step(order, GUESS_FOLDS)
        certainty.append(0.0 if resampled is None else search.share_picked(resampled, order, layer))
        order.append(layer)
    return order, certainty


def worth_measuring(
    search: AttentionSearch, order: list[int], guess: list[int], certainty: list[float]
) -> list[frozenset[int]]:
    """
    The sets of the next step, and of steps after it that are worth measuring in the same pass: the blocks they add,
    against those of a pass of their own times the probability that the search comes there.
    """
    sets = list(search.sets_with(order).values())
    if set(order) != set(guess[: len(order)]):
        return sets
    num_layers, probability = len(search.passes.model.encoder_layers), 1.0
    for position in range(len(order) + 1, min(len(guess), search.num_layers)):
        probability *= certainty[position - 1]
        more = list(search.sets_with(guess[:position]).values())
        now, then, alone = (count_blocks(search.unknown(some), num_layers) for some in (sets, [*sets, *more], more))
        if then - now > probability * alone:
            break
        sets += more
    return sets


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
