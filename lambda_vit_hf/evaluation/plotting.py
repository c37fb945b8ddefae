"""Plots of a selection (entropies, search, pairs of layers) and of a training."""

from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.colors import SymLogNorm
from matplotlib.figure import Figure  # not pyplot, whose backend and open figures are the user's
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from ..selection.output_change import DIVERGENCES
from ..selection.select import AttentionSelection


ATTENTION, MLP, REMOVED = "#3366aa", "#dd8833", "#cc3344"


def plot_layer_entropies(selection: AttentionSelection, path: str | Path) -> None:
    """
    Two panels by depth: entropy of attention and MLP outputs (nats) with the chosen layers marked, and the transfer
    entropy (nats) at which each chosen layer was picked. PNG.
    """
    figure = Figure(figsize=(11, 4), layout="constrained")
    entropies, picks = figure.subplots(1, 2, width_ratios=(3, 2))
    layers = range(len(selection.mlp_entropy))
    for layer in selection.layers:
        entropies.axvspan(layer - 0.4, layer + 0.4, color=REMOVED, alpha=0.15, lw=0,
                          label="attention removed" if layer == selection.layers[0] else None)  # fmt: skip
    known = [(layer, value) for layer, value in enumerate(selection.attention_entropy) if value is not None]
    entropies.plot(*zip(*known, strict=True), "o-", color=ATTENTION, label="attention output")
    entropies.plot(layers, selection.mlp_entropy, "s--", color=MLP, label="MLP output")
    entropies.set(xlabel="layer (0 = nearest to the image)", ylabel="entropy (nats, up to a constant)",
                  title=f"Entropy over {selection.num_images} images")  # fmt: skip
    entropies.xaxis.set_major_locator(MaxNLocator(integer=True))
    entropies.legend(fontsize=8)
    values = [step.transfer_entropy[step.picked] for step in selection.steps]
    picks.bar(range(len(values)), values, color=REMOVED)
    picks.set_xticks(range(len(values)), [f"+{step.picked}" for step in selection.steps])
    picks.axhline(0, color="black", lw=0.8)
    picks.set(xlabel="layer added to the removed set", ylabel="transfer entropy of the set (nats)",
              title=f"Search path ({selection.strategy})")  # fmt: skip
    figure.savefig(path, dpi=120)


def plot_search(selection: AttentionSelection, path: str | Path) -> None:
    """
    Heat map of the search: transfer entropy (nats) of the set so far with each candidate, step by step. The pick of
    each step is framed, with the share of resamples of the images that pick it too; picked layers drop out. PNG.

    Raises:
        ValueError: if the selection holds no search.
    """
    if not selection.steps:
        raise ValueError(f"{selection.strategy!r} chooses without a search: there are no steps to draw.")
    layers = sorted({layer for step in selection.steps for layer in step.transfer_entropy})
    values = [[step.transfer_entropy.get(layer, np.nan) for layer in layers] for step in selection.steps]
    figure = Figure(figsize=(3 + 0.6 * len(layers), 1.8 + 0.5 * len(values)), layout="constrained")
    axes = figure.subplots()
    _heat_map(figure, axes, values, "transfer entropy (nats)")
    for row, step in enumerate(selection.steps):
        column = layers.index(step.picked)
        axes.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, lw=2.5, ec="black", zorder=3))
    stable = ["" if step.stability is None else f" ({step.stability:.0%})" for step in selection.steps]
    axes.set_xticks(range(len(layers)), layers)
    axes.set_yticks(range(len(values)), [f"{row}: +{step.picked}{stable[row - 1]}"
                                         for row, step in enumerate(selection.steps, 1)])  # fmt: skip
    axes.set(xlabel="candidate layer (0 = nearest to the image)", ylabel="step: pick (share of resamples)",
             title=f"Search path ({selection.strategy}): {selection.output}, {selection.mask} mask")  # fmt: skip
    figure.savefig(path, dpi=120)


def plot_pairs(selection: AttentionSelection, path: str | Path) -> None:
    """
    Two heat maps: transfer entropy (nats) of each pair of layers, with single layers on the diagonal, and how far the
    pairs are from the sum of their two layers (the interaction). PNG.

    Raises:
        ValueError: if the selection was made without `pairs=True`.
    """
    if not selection.pair_transfer_entropy:
        raise ValueError("The pairs were not measured: pass `pairs=True` to `select_attention_layers`.")
    size = 2.2 + 0.42 * len(selection.pair_transfer_entropy)
    figure = Figure(figsize=(2 * size + 1, size), layout="constrained")
    panels = figure.subplots(1, 2)
    contents = (
        (selection.pair_transfer_entropy, "TE(i, j); diagonal: TE(i)"),
        (selection.interactions, "interaction: TE(i, j) - TE(i) - TE(j)"),
    )
    for axes, (matrix, title) in zip(panels, contents, strict=True):
        matrix = [[np.nan if value is None else value for value in row] for row in matrix]
        _heat_map(figure, axes, matrix, "nats")
        axes.set(xlabel="layer j", ylabel="layer i", title=title)
        axes.set_xticks(range(len(matrix)))
        axes.set_yticks(range(len(matrix)))
    figure.savefig(path, dpi=120)


def _heat_map(figure, axes, values: list[list[float]], label: str) -> None:
    """White is 0, blue below, red above; NaN is gray. Each cell shows its number."""
    values = np.asarray(values, dtype=float)
    sizes = np.abs(values[~np.isnan(values)])
    # Logarithmic beyond the middle value: one layer that matters much would leave all others white.
    middle = float(np.median(sizes[sizes > 0])) if (sizes > 0).any() else 1.0
    bound = max(float(sizes.max(initial=0)), 2 * middle)
    norm = SymLogNorm(linthresh=middle, vmin=-bound, vmax=bound)
    colors = matplotlib.colormaps["RdBu_r"].with_extremes(bad="#dddddd")
    image = axes.imshow(values, cmap=colors, norm=norm, aspect="auto")
    ticks = [sign * size for size in (bound, np.sqrt(bound * middle), middle) for sign in (-1, 1)]
    figure.colorbar(image, ax=axes, label=label, ticks=sorted([0, *ticks]), format="%.2g")
    for (row, column), value in np.ndenumerate(values):
        if not np.isnan(value):
            color = "white" if abs(norm(value) - 0.5) > 0.33 else "black"
            digits = 1 if abs(value) >= 10 else 2 if abs(value) >= 1 else 3
            axes.text(column, row, f"{value:.{digits}f}", ha="center", va="center", fontsize=7, color=color)


def plot_training(
    log_history: list[dict], path: str | Path, base_accuracy: float | None = None, score: str = "accuracy"
) -> None:
    """
    Lambda and validation accuracy (%), or another score, over training steps, from a Trainer's `state.log_history`.
    PNG.

    Args:
        log_history (`list[dict]`): the Trainer's.
        path (`str` or `Path`): the picture.
        base_accuracy (`float`, *optional*): of the unpruned model, in [0, 1], or its other score; drawn as a line.
        score (`str`, *optional*, defaults to `"accuracy"`): a metric of the Trainer's evaluations.
    """
    lambdas = sorted({entry["step"]: entry["lambda"] for entry in log_history if "lambda" in entry}.items())
    name, unit, factor = ("top-1", " (%)", 100) if score == "accuracy" else (score.replace("_", " "), "", 1)
    scores = [(e["step"], factor * e[f"eval_{score}"]) for e in log_history if f"eval_{score}" in e]
    figure = Figure(figsize=(7, 4), layout="constrained")
    left = figure.subplots()
    if lambdas:
        left.plot(*zip(*lambdas, strict=True), color=REMOVED, label="lambda")
    left.set(xlabel="optimizer step", ylabel="lambda (1: attention, 0: identity)", ylim=(-0.03, 1.05))
    right = left.twinx()
    if scores:
        right.plot(*zip(*scores, strict=True), "o-", color=ATTENTION, label=name)
    if base_accuracy is not None:
        right.axhline(factor * base_accuracy, color="gray", ls=":", label=f"{name} before")
    right.set_ylabel(f"validation {name}{unit}")
    handles = [handle for axis in (left, right) for handle in axis.get_legend_handles_labels()[0]]
    left.legend(handles=handles, loc="lower center")
    left.set_title(f"Attention fades out; {'accuracy' if score == 'accuracy' else name} follows")
    figure.savefig(path, dpi=120)


def plot_removal_curve(curve, path: str | Path, chosen: int | None = None) -> None:
    """
    What a [`RemovalCurve`] says by number of removed layers: divergence from the whole model, of the strategy and of
    those it is compared with, and what is saved. PNG.

    Args:
        curve ([`RemovalCurve`]): measured.
        path (`str` or `Path`): of the picture.
        chosen (`int`, *optional*): the number that was chosen, marked.
    """
    figure = Figure(figsize=(11, 4), layout="constrained")
    change, savings = figure.subplots(1, 2)
    numbers = range(len(curve.points))
    for name, points in curve.compared.items():
        change.plot(numbers, [point.divergence for point in points], lw=1, alpha=0.6, label=name)
    change.plot(numbers, [point.divergence for point in curve.points], "o-", color=ATTENTION,
                label=curve.selection.strategy)  # fmt: skip
    label = f"{DIVERGENCES[curve.points[0].kind]}, from the whole model"
    smallest = min((point.divergence for point in curve.points[1:] if point.divergence > 0), default=1e-3)
    change.set_yscale("symlog", linthresh=smallest)
    change.set(xlabel="attention layers removed", ylabel=label, title="What removal changes, before any training")
    whole = curve.points[0]
    for title, name, style in (("parameters", "parameters", "--"), ("multiply-accumulates", "macs", "-.")):
        savings.plot(numbers, [getattr(whole, name) / getattr(point, name) for point in curve.points], style,
                     color=MLP, label=f"{title}, whole / left")  # fmt: skip
    if whole.images_per_second:
        ratios = [point.images_per_second / whole.images_per_second for point in curve.points]
        savings.plot(numbers, ratios, "o-", color=ATTENTION, label="images/s, measured")
    savings.set(xlabel="attention layers removed", ylabel="ratio to the whole model", title="What it saves")
    for axes in (change, savings):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if chosen is not None:
            axes.axvline(chosen, color=REMOVED, lw=1, label=f"chosen: {chosen}")
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)
