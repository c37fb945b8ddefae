"""Draws overview.svg, the picture of the README, from the figures in results/.

python docs/images/overview.py
"""

import json
import statistics
from pathlib import Path

from matplotlib import rcParams
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch


ROOT = Path(__file__).parents[2]
REMOVED, KEPT, GONE = "#dd8833", "#3366aa", "#cccccc"


def block(axis, x: float, title: str, has_attention: bool) -> None:
    """One transformer block, from below to above."""
    boxes = [(0.55, "MLP", KEPT), (0.17, "attention", KEPT if has_attention else GONE)]
    axis.plot([x, x], [0.02, 0.9], color="#333333", linewidth=1.5, zorder=1)
    axis.annotate("", (x, 0.95), (x, 0.86), arrowprops=dict(arrowstyle="->", color="#333333"))
    for y, name, color in boxes:
        gone = color == GONE
        box = FancyBboxPatch((x + 0.06, y), 0.3, 0.14, boxstyle="round,pad=0.012", edgecolor=color, zorder=2,
                             facecolor="white" if gone else color, linestyle="--" if gone else "-")  # fmt: skip
        axis.add_patch(box)
        text = f"{name}\ndeleted" if gone else f"LayerNorm\n{name}"
        axis.text(
            x + 0.21, y + 0.07, text, ha="center", va="center", color="#888888" if gone else "white", fontsize=7.5
        )
        if not gone:
            axis.plot([x, x + 0.06], [y - 0.05, y + 0.0], color="#333333", linewidth=1)
            axis.plot([x + 0.06, x], [y + 0.14, y + 0.19], color="#333333", linewidth=1)
            axis.text(x, y + 0.2, "+", ha="center", va="center", fontsize=10,
                      bbox=dict(boxstyle="circle,pad=0.1", facecolor="white", edgecolor="#333333"))  # fmt: skip
    axis.text(x + 0.15, 1.03, title, ha="center", fontsize=9)


def accuracies(axis) -> None:
    places, labels = [], []
    for group, (name, shown) in enumerate((("digits", "digits"), ("fashion_mnist", "Fashion-MNIST"))):
        data = json.loads((ROOT / "results" / f"{name}_comparison.json").read_text(encoding="utf-8"))
        by_default = {"output": "class_head", "mask": "identity", "compare": "magnitude", "num_removed": 6}
        removed = [choice["top1_diluted"] for choice in data["choices"] if by_default.items() <= choice.items()]
        control = [run["top1_diluted"] for run in data["controls"]]
        for place, (values, color) in enumerate(((control, KEPT), (removed, REMOVED))):
            mean, deviation = 100 * statistics.mean(values), 100 * statistics.stdev(values)
            x = 3 * group + place
            axis.bar(x, mean, yerr=deviation, color=color, capsize=3)
            axis.text(x, 81, f"{mean:.1f}", ha="center", color="white", fontsize=8)
        places.append(3 * group + 0.5)
        labels.append(shown)
    axis.set_xticks(places, labels, fontsize=8)
    axis.set(ylim=(80, 100), title="top-1 (%, axis from 80), trained equally long")
    handles = [axis.containers[1][0], axis.containers[3][0]]
    axis.legend(handles, ["all 12 attention layers", "6 removed"], fontsize=7, loc="upper right")


def speeds(axis) -> None:
    data = json.loads((ROOT / "results" / "benchmark_inference_cpu.json").read_text(encoding="utf-8"))
    rows = {row["model"]: row for row in data["rows"] if row["batch_size"] == 8 and row["precision"] == "fp32"}
    shown = {"transformers": "all 12", "lambda+removed+folded+stacked": "5 removed",
             "lambda+removed+folded+prepared": "5 removed,\nprepared"}  # fmt: skip
    values = [rows[name]["speedup"] for name in shown]
    bars = axis.bar(list(shown.values()), values, color=[KEPT, REMOVED, REMOVED])
    axis.bar_label(bars, [f"{value:.2f}x" for value in values], fontsize=8)
    axis.tick_params(axis="x", labelsize=8)
    axis.set(ylim=(0, 1.5), title="images/s, DeiT-B shape, CPU, fp32")


def main() -> None:
    rcParams["svg.hashsalt"] = "overview"  # the same file from the same figures
    figure = Figure(figsize=(10, 3.1), layout="constrained")
    left, middle, right = figure.subplots(1, 3, width_ratios=(1.25, 1, 1))
    block(left, 0.1, "a block before", has_attention=True)
    block(left, 0.75, "and after", has_attention=False)
    left.set(xlim=(0, 1.2), ylim=(0, 1.1))
    left.axis("off")
    accuracies(middle)
    speeds(right)
    for axis in (middle, right):
        axis.title.set_fontsize(9)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(Path(__file__).with_suffix(".svg"), metadata={"Date": None})


if __name__ == "__main__":
    main()
