"""Ways to choose attention layers: NOSE, wider searches, and the simple rules they are compared with.

A strategy is a function from an [`AttentionSearch`] to layers, in the order picked.
"""

import itertools
import math
import random
from collections.abc import Callable, Sequence

from . import layer_scores
from .search import AttentionSearch


MOST_SETS = 5000


def nose(search: AttentionSearch) -> list[int]:
    """
    Entropy-based selection (paper, section 3.2): greedy, the layer with which the set has the least transfer entropy.
    """
    order: list[int] = []
    while len(order) < search.num_layers:
        order.append(search.pick(order))
    return order


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


def greedy(candidates: Sequence[int], number: int, measure: Callable[[list[list[int]]], Sequence[float]]) -> list[int]:
    """
    One candidate after the other, each time the one with which the set has the least value; the first of equals.

    Args:
        candidates (`Sequence[int]`): to pick from.
        number (`int`): how many to pick.
        measure (`Callable`): from sets of candidates to one value each, in any unit.

    Returns:
        `list[int]`: in the order picked.
    """
    order: list[int] = []
    while len(order) < number:
        rest = [one for one in candidates if one not in order]
        values = measure([[*order, one] for one in rest])
        order.append(min(zip(values, rest, strict=True), key=lambda pair: pair[0])[1])
    return order


def divergence(search: AttentionSearch) -> list[int]:
    """
    Greedy as [`nose`], but the layer with which the output stays nearest to the whole model's: the least KL divergence
    of the class probabilities, or cosine distance of the features (see [`AttentionSearch.output_change`]).
    """

    def divergences(sets: list[list[int]]) -> list[float]:
        return [change.divergence for change in search.output_change(sets)]

    return greedy(search.candidates, search.num_layers, divergences)


def lowest_entropy(search: AttentionSearch) -> list[int]:
    """The layers whose own attention output has the least entropy."""
    return sorted(search.candidates, key=lambda layer: search.attention_entropy[layer])[: search.num_layers]


def lowest(score: Callable[[AttentionSearch], list[float | None]]) -> Callable[[AttentionSearch], list[int]]:
    """The layers of least score, one of `layer_scores`: each rated on its own."""

    def take_lowest(search: AttentionSearch) -> list[int]:
        return sorted(search.candidates, key=score(search).__getitem__)[: search.num_layers]

    return take_lowest


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
    "divergence": divergence,
    "lowest_entropy": lowest_entropy,
    "cosine": lowest(layer_scores.attention_influence),
    "attention_deviation": lowest(layer_scores.attention_deviation),
    "attention_benefit": lowest(layer_scores.attention_benefit),
    "lambda_sensitivity": lowest(layer_scores.lambda_sensitivity),
    "weight_entropy": lowest(layer_scores.weight_entropy),
    "first": first,
    "last": last,
    "random": random_layers,
}
