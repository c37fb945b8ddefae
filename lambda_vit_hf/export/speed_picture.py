"""The plot of an inference benchmark."""

from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.patches import Rectangle


COLORS = {"fp32": "#3366aa", "bf16": "#dd8833", "fp16": "#888833", "int8": "#cc3344"}


def plot_inference(result: dict, path: str | Path) -> None:
    """
    Accuracy against throughput where accuracy is known, else throughput as bars; at the largest batch size. PNG.

    Args:
        result (`dict`): of [`measure_inference`].
        path (`str` or `Path`): the picture.
    """
    batch_size = max(row["batch_size"] for row in result["rows"])
    rows = [row for row in result["rows"] if row["batch_size"] == batch_size]
    known = [row for row in rows if row["accuracy"] is not None]
    figure = Figure(figsize=(9.5, 4.5 if known else 1.2 + 0.38 * len(rows)), layout="constrained")
    axis = figure.subplots()
    if known:
        _scatter(axis, known)
    else:
        _bars(axis, rows)
    environment = result["environment"]
    axis.set_title(f"Batch {batch_size}; {environment['hardware']}; {environment['date']}", fontsize=9)
    figure.savefig(path, dpi=120)


def _scatter(axis, rows: list[dict]) -> None:
    for number, row in enumerate(rows, start=1):
        x, y = row["images_per_second"], 100 * row["accuracy"]
        label = f"{number}  {row['model']} ({row['precision']})"
        axis.scatter(x, y, color=COLORS[row["precision"]], label=label, zorder=2)
        # Above and below by turns: models of the same accuracy stand in one line.
        axis.annotate(number, (x, y), xytext=(0, 7 if number % 2 else -15), textcoords="offset points", ha="center")
    accuracies = [100 * row["accuracy"] for row in rows]
    axis.set(xlabel="images/s", ylabel="top-1 (%)", ylim=(min(accuracies) - 1, min(max(accuracies) + 1, 101)))
    axis.margins(x=0.1)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.01, 0.5))


def _bars(axis, rows: list[dict]) -> None:
    places = range(len(rows))
    speeds = [row["images_per_second"] for row in rows]
    gains = [row.get("speedup_like_for_like") for row in rows]
    bars = axis.barh(places, speeds, color=[COLORS[row["precision"]] for row in rows])
    axis.bar_label(bars, [f"{speed:,.1f}" + (f"  ({gain:.2f}x)" if gain else "")
                          for speed, gain in zip(speeds, gains, strict=True)], padding=3, fontsize=8)  # fmt: skip
    axis.set_yticks(places, [row["model"] for row in rows], fontsize=8)
    axis.invert_yaxis()
    axis.margins(x=0.2)
    axis.set_xlabel("images/s (times transformers in the same engine and precision)")
    precisions = [name for name in COLORS if any(row["precision"] == name for row in rows)]
    handles = [Rectangle((0, 0), 1, 1, color=COLORS[name]) for name in precisions]
    axis.legend(handles, precisions, fontsize=8, loc="lower left", bbox_to_anchor=(1.01, 0))
