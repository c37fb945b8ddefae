"""Pictures: why these layers, and how training went."""

from pathlib import Path

import matplotlib


matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.ticker import MaxNLocator

from .selection import AttentionSelection


ATTENTION, MLP, REMOVED = "#3366aa", "#dd8833", "#cc3344"


def plot_layer_entropies(selection: AttentionSelection, path: str | Path) -> None:
    """
    Two panels by depth: entropy of attention and MLP outputs (nats) with the chosen layers marked, and the transfer
    entropy (nats) at which each chosen layer was picked. PNG.
    """
    figure, (entropies, picks) = plt.subplots(1, 2, figsize=(11, 4), width_ratios=(3, 2), layout="constrained")
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
    plt.close(figure)


def plot_training(log_history: list[dict], path: str | Path, base_accuracy: float | None = None) -> None:
    """
    Lambda and validation accuracy (%) over training steps, from a Trainer's `state.log_history`. PNG.

    Args:
        log_history (`list[dict]`): the Trainer's.
        path (`str` or `Path`): the picture.
        base_accuracy (`float`, *optional*): accuracy of the unpruned model, in [0, 1]; drawn as a line.
    """
    lambdas = sorted({entry["step"]: entry["lambda"] for entry in log_history if "lambda" in entry}.items())
    accuracies = [(e["step"], 100 * e["eval_accuracy"]) for e in log_history if "eval_accuracy" in e]
    figure, left = plt.subplots(figsize=(7, 4), layout="constrained")
    if lambdas:
        left.plot(*zip(*lambdas, strict=True), color=REMOVED, label="lambda")
    left.set(xlabel="optimizer step", ylabel="lambda (1: attention, 0: identity)", ylim=(-0.03, 1.05))
    right = left.twinx()
    if accuracies:
        right.plot(*zip(*accuracies, strict=True), "o-", color=ATTENTION, label="top-1")
    if base_accuracy is not None:
        right.axhline(100 * base_accuracy, color="gray", ls=":", label="top-1 before")
    right.set_ylabel("validation top-1 (%)")
    handles = [handle for axis in (left, right) for handle in axis.get_legend_handles_labels()[0]]
    left.legend(handles=handles, loc="lower center")
    left.set_title("Attention fades out; accuracy follows")
    figure.savefig(path, dpi=120)
    plt.close(figure)
