"""The tables of a comparison of selections, from its figures."""

import itertools
import statistics

from scipy.stats import spearmanr

from lambda_vit_hf.evaluation.throughput import markdown_table


CHOICE = ("output", "mask", "compare")
MEASURED = {
    "transfer_entropy": "TE (nats)",
    "divergence": "KL (nats)",
    "top1_before": "top-1 before (%)",
    "top1_skip": "skipped (%)",
    "top1_identity": "doubled (%)",
    "top1_linear": "mapped (%)",
    "top1_diluted": "diluted (%)",
}
PREDICTORS = ("transfer_entropy", "divergence", "top1_before_training")


def measured_after(epochs: float | None) -> str:
    """Name of the accuracy after a training of this many epochs; `None`: of the recipe's."""
    return "top1_diluted" if epochs is None else f"top1_after_{epochs:g}_epochs"


def title_of(name: str) -> str:
    return MEASURED.get(name) or f"after {name.removeprefix('top1_after_').removesuffix('_epochs')} epochs (%)"


def tabulate(runs: list[dict], keys: tuple[str, ...]) -> list[dict]:
    """Mean and standard deviation over seeds of what every seed has, by number of removed layers and `keys`."""
    keys = ("num_removed", *keys)
    groups: dict[tuple, list[dict]] = {}
    for run in runs:
        groups.setdefault(tuple(run.get(key, "") for key in keys), []).append(run)
    rows = []
    for group, same in groups.items():
        removed = [run.get("blocks") or run["layers"] for run in same]
        row = {**dict(zip(keys, group, strict=True)), "layers": removed}
        names = {name: None for run in same for name in run if name in MEASURED or name.startswith("top1_after_")}
        for name in names:
            values = [run[name] for run in same if name in run]
            if len(values) == len(same):
                deviation = statistics.stdev(values) if len(values) > 1 else 0.0
                row[name] = {"mean": statistics.mean(values), "deviation": deviation}
        rows.append(row)
    return rows


def print_tables(results: dict) -> None:
    print_rows(results["table"], ("fade_to", "strategy"))
    if results["choices"]:
        print_rows(tabulate(results["choices"], CHOICE), CHOICE)
    if results["random_sets"]:
        print_correlations(results["random_sets"])
    print_regrets(results["runs"])
    print_predictions(results["runs"])


def print_rows(rows: list[dict], keys: tuple[str, ...]) -> None:
    def cell(row: dict, name: str) -> str:
        if name not in row:
            return ""
        scale, digits = (1, 3) if name in ("transfer_entropy", "divergence") else (100, 2)
        return f"{scale * row[name]['mean']:.{digits}f} ± {scale * row[name]['deviation']:.{digits}f}"

    names = {name: None for row in rows for name, value in row.items() if isinstance(value, dict)}
    measured = sorted(names, key=lambda name: list(MEASURED).index(name) if name in MEASURED else len(MEASURED))
    cells = [
        [row["num_removed"], *(row.get(key, "") for key in keys), *(cell(row, name) for name in measured),
         "; ".join(" ".join(map(str, chosen)) or "none" for chosen in row["layers"])]
        for row in rows
    ]  # fmt: skip
    print(f"\n{markdown_table(['removed', *keys, *map(title_of, measured), 'layers'], cells)}")


def print_correlations(random_sets: list[dict]) -> None:
    """Rank correlation of TE with the loss of top-1 over random sets, doubled: mean over seeds (least to most)."""
    rows = []
    for number in sorted({measured["num_removed"] for measured in random_sets}):
        of_seeds = [measured["correlations"] for measured in random_sets if measured["num_removed"] == number]
        for same in zip(*of_seeds, strict=True):
            row = [number, *(same[0][name] for name in CHOICE)]
            for name in ("with_loss_identity", "with_loss_identity_without_worst"):
                known = [one[name] for one in same if one[name] is not None]
                row.append(f"{statistics.mean(known):.2f} ({min(known):.2f} to {max(known):.2f})" if known else "")
            rows.append(row)
    print(f"\n{markdown_table(['removed', *CHOICE, 'all sets', 'without the layer that costs most'], rows)}")


def trained(run: dict) -> list[str]:
    """Names of the accuracies after training that a run has."""
    return [name for name in run if name == "top1_diluted" or name.startswith("top1_after_")]


def print_regrets(runs: list[dict]) -> None:
    """
    Accuracy lost against the best set of layers that was trained, whatever it fades to, per seed and number removed:
    mean over seeds, and its standard error where there are several. Whole blocks may do better: below 0.
    """
    rows = []
    for number, budget in itertools.product(*_distinct(runs)):
        of_number = [run for run in runs if run["num_removed"] == number and budget in run]
        best: dict[int, float] = {}
        for run in of_number:
            if run.get("blocks"):
                continue
            best[run["seed"]] = max(best.get(run["seed"], 0.0), run[budget])
        groups: dict[tuple, list[float]] = {}
        for run in of_number:
            key = (run["fade_to"], run["strategy"])
            groups.setdefault(key, []).append(100 * (best[run["seed"]] - run[budget]))
        for (fade_to, strategy), regrets in sorted(groups.items(), key=lambda pair: statistics.mean(pair[1])):
            error = f" ± {statistics.stdev(regrets) / len(regrets) ** 0.5:.2f}" if len(regrets) > 1 else ""
            rows.append([number, title_of(budget), fade_to, strategy, f"{statistics.mean(regrets):.2f}{error}"])
    if rows:
        print(f"\n{markdown_table(['removed', 'trained', 'fade_to', 'strategy', 'regret (points)'], rows)}")


def print_predictions(runs: list[dict]) -> None:
    """
    Rank correlation of figures taken before training with the accuracy after it, over the distinct sets of layers that
    were trained, per seed: the mean over seeds. Where there are at least five sets.
    """
    rows = []
    for fade_to in dict.fromkeys(run["fade_to"] for run in runs if not run.get("blocks")):
        for number, budget in itertools.product(*_distinct(runs)):
            values: dict[str, list[float]] = {}
            sizes = []
            for seed in dict.fromkeys(run["seed"] for run in runs):
                sets = {
                    tuple(run["layers"]): run
                    for run in runs
                    if (run["fade_to"], run["num_removed"], run["seed"]) == (fade_to, number, seed)
                    and budget in run and "divergence" in run
                }  # fmt: skip
                if len(sets) < 5:
                    continue
                sizes.append(len(sets))
                after = [run[budget] for run in sets.values()]
                for name in PREDICTORS:
                    before = [_predicted_loss(run, name, fade_to) for run in sets.values()]
                    values.setdefault(name, []).append(-float(spearmanr(before, after).statistic))
            if sizes:
                cells = [f"{statistics.mean(values[name]):.2f}" for name in PREDICTORS]
                rows.append([number, title_of(budget), fade_to, min(sizes), *cells])
    if rows:
        header = ["removed", "trained", "fade_to", "sets", "|TE|", "KL", "top-1 right after"]
        print(f"\n{markdown_table(header, rows)}")


def _predicted_loss(run: dict, name: str, fade_to: str) -> float:
    return -run[f"top1_{fade_to}"] if name == "top1_before_training" else abs(run[name])


def _distinct(runs: list[dict]) -> tuple[list[int], list[str]]:
    numbers = dict.fromkeys(run["num_removed"] for run in runs)
    budgets = dict.fromkeys(name for run in runs for name in trained(run))
    return list(numbers), list(budgets)
