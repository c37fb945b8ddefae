"""Compare ways of choosing layers: same base models, same training, several seeds; print tables, save the figures.

    python -m benchmarks.compare_selections trainer_scripts/recipes/digits.yaml --num_train_epochs 8
    python -m benchmarks.compare_selections trainer_scripts/recipes/digits.yaml --seeds 0 1 --num_removed 3 6 \
        --strategies nose last --random_sets 0 --output_dir outputs/quick
    python -m benchmarks.compare_selections results/digits_comparison.json  # prints the tables again
    python -m benchmarks.compare_selections trainer_scripts/recipes/fashion_mnist.yaml --dataset_dir DIR \
        --base_models BASE0 BASE1 BASE2 --num_train_images 10000 --num_removed 3 6 \
        --strategies nose cosine first last random --output_dir outputs/fashion_mnist_comparison

For each seed: a base model, trained by the recipe or given; every strategy at every number of removed layers, with its
transfer entropy, top-1 right after removal and top-1 after dilution (each distinct set of layers is trained once; the
whole model too, for as long: the control); what NOSE picks with each output, mask and comparison; and random sets, for
the correlation of transfer entropy with the loss of accuracy. `--fades identity skip linear` does it for each thing
that can take the place of attention (linear maps are there at once, see `fit_linear_maps`), and `--budgets 2 6` for
trainings of so many epochs. A strategy masks as attention fades, but `nose:skip` always by `skip`; `random:0 random:1`
are several draws; `loss` and `loss_gradient` use labels, `learned_lambdas` follows the gradient of the KL divergence.
`--blocks` removes whole blocks too, as many as save the same. Other options override fields of the recipe; with
`--distillation` the teacher is the base model.

The last tables: how far each strategy ends behind the best of all sets that were trained (its regret), and which
figure taken before training ranks the trained sets as training does.

Figures are in OUTPUT_DIR.json after each training. The same command goes on where it was stopped, and with other
strategies, numbers, fades or budgets it takes over the trainings that are done.
"""

import argparse
import itertools
import json
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.comparison_tables import measured_after, print_tables, tabulate


STRATEGIES = ["nose", "exhaustive", "beam", "lowest_entropy", "cosine", "first", "last", "random"]
ASKED = (
    "strategies",
    "num_removed",
    "fades",
    "budgets",
    "num_random_sets",
    "train_choices",
    "blocks",
)  # of the same trainings


def read_command_line(argv: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("recipe", help="a YAML file; or figures of an earlier comparison (JSON), to be printed")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--strategies", nargs="+", default=STRATEGIES)
    parser.add_argument("--num_removed", type=int, nargs="+", default=[3, 4, 5, 6])
    parser.add_argument("--base_models", nargs="+", help="a trained model per seed; without it the recipe trains them")
    parser.add_argument("--fades", nargs="+", default=["identity"], help="identity, skip, linear")
    parser.add_argument("--budgets", type=float, nargs="+", default=[None], help="epochs; by default the recipe's")
    parser.add_argument("--num_masked_images", type=int, help="for top-1 right after removal; all by default")
    parser.add_argument("--no_choices", action="store_true", help="only the strategies as they are")
    parser.add_argument("--num_train_images", type=int, help="train on this many, evenly spaced; all by default")
    parser.add_argument("--random_sets", type=int, default=48, help="per seed, of the least and most layers; 0: none")
    parser.add_argument("--train_choices", action="store_true", help="dilute what NOSE picks with each choice, too")
    parser.add_argument("--blocks", action="store_true", help="whole blocks too, at equal multiply-accumulates")
    parser.add_argument("--no_training", action="store_true", help="only what is known right after removal")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/comparison"))
    options, overrides = parser.parse_known_args(argv)
    if options.base_models and len(options.base_models) != len(options.seeds):
        parser.error(f"--base_models: one per seed, {len(options.seeds)}, not {len(options.base_models)}")
    return options, overrides


def main(argv: list[str] | None = None) -> None:
    options, overrides = read_command_line(argv)
    if options.recipe.endswith(".json"):
        print_tables(_completed(json.loads(Path(options.recipe).read_text(encoding="utf-8"))))
        return

    from benchmarks.experiment import Experiment
    from lambda_vit_hf.evaluation.throughput import describe_environment

    path = options.output_dir.with_suffix(".json")
    settings = {
        "recipe": Path(options.recipe).name, "overrides": overrides, "seeds": options.seeds,
        "strategies": options.strategies, "num_removed": options.num_removed,
        "num_train_images": options.num_train_images, "num_random_sets": options.random_sets,
        "train_choices": options.train_choices, "base_models": options.base_models,
        "fades": options.fades, "budgets": options.budgets, "num_masked_images": options.num_masked_images,
        "blocks": options.blocks,
    }  # fmt: skip
    results = open_results(path, settings)
    experiment = Experiment(
        options.recipe, overrides, options.output_dir, options.num_train_images, options.num_masked_images
    )
    checkpoints = dict(zip(options.seeds, options.base_models or [None] * len(options.seeds), strict=True))
    results |= {
        "command": shlex.join(["python", "-m", "benchmarks.compare_selections", *(argv or sys.argv[1:])]),
        "environment": describe_environment(experiment.training_args.device),
        "num_validation_images": len(experiment.splits["validation"]),
    }

    def save() -> None:
        controls = [run | {"num_removed": 0, "strategy": "control"} for run in results["controls"]]
        results["table"] = tabulate([*controls, *results["runs"]], ("fade_to", "strategy"))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")

    for seed in options.seeds:
        if seed not in {run["seed"] for run in results["runs"]}:
            measure(results, options, experiment.base_model(seed, checkpoints[seed]))
            save()
    if not options.no_training:
        train(results, options, experiment, checkpoints, save)
    print_tables(results)
    print(f"\nFigures in {path}")


def open_results(path: Path, settings: dict) -> dict:
    """What an interrupted run of the same settings has measured, or nothing yet."""
    results = {"settings": settings, "trainings": {}, "runs": [], "choices": [], "random_sets": [], "controls": []}
    if not path.is_file():
        return results
    found = _completed(json.loads(path.read_text(encoding="utf-8")))
    changed = {name: (found["settings"].get(name), value) for name, value in settings.items()
               if found["settings"].get(name) != value}  # fmt: skip
    if changed.keys() - set(ASKED):
        raise ValueError(f"{path} holds figures of other settings (then, now): {changed}. Give another --output_dir.")
    return results | ({"trainings": found["trainings"]} if changed else found)


def _completed(results: dict) -> dict:
    """Figures of an earlier version, which knew fewer settings."""
    for name in ("base_models", "num_masked_images"):
        results["settings"].setdefault(name, None)
    results["settings"] = {"fades": ["identity"], "budgets": [None], "blocks": False} | results["settings"]
    for run in results["runs"]:  # of a version that knew no other fade, and masked by `skip`
        run.setdefault("fade_to", "identity")
    return results


def measure(results: dict, options: argparse.Namespace, base) -> None:
    """All of a base model that needs no training."""
    print(f"seed {base.seed}: strategies, choices, random sets", flush=True)
    runs = base.compare_strategies(options.strategies, options.num_removed, options.fades)
    choices = [] if options.no_choices else base.compare_choices(options.num_removed)
    numbers = sorted({min(options.num_removed), max(options.num_removed)}) if options.random_sets else []
    random_sets = [base.measure_random_sets(number, options.random_sets) for number in numbers]
    results["runs"] += runs + (base.compare_blocks(options.num_removed) if options.blocks else [])
    results["choices"] += choices
    results["random_sets"] += random_sets


def train(results: dict, options: argparse.Namespace, experiment, checkpoints: dict, save: Callable[[], None]) -> None:
    """Dilution of every set of layers that was chosen, each once per seed; and of none, to compare with."""
    before = {run["seed"]: run["top1_before"] for run in results["runs"]}
    results["controls"] = [
        {"seed": seed, "layers": [], "top1_before": before[seed], "fade_to": ""} for seed in options.seeds
    ]
    runs = [*results["controls"], *results["runs"]]
    if options.train_choices:
        runs += [run for run in results["choices"] if run["num_removed"] == max(options.num_removed)]
    for epochs, (number, run) in itertools.product(options.budgets, enumerate(runs, 1)):
        key = name_training(run, epochs)
        if key not in results["trainings"]:
            start, seed = time.monotonic(), run["seed"]
            fade_to, blocks = run.get("fade_to") or None, tuple(run.get("blocks", ()))
            top1 = experiment.dilute(run["layers"], fade_to, seed, checkpoints[seed], epochs, blocks)
            results["trainings"][key] = {"top1": top1, "seconds": round(time.monotonic() - start, 1)}
            print(f"{number} of {len(runs)}: {key}: top-1 {top1:.4f}", flush=True)
        run[measured_after(epochs)] = results["trainings"][key]["top1"]
        save()
    for epochs, run in itertools.product(options.budgets, results["choices"]):
        if name_training(run, epochs) in results["trainings"]:  # a strategy chose the same layers
            run[measured_after(epochs)] = results["trainings"][name_training(run, epochs)]["top1"]
    save()


def name_training(run: dict, epochs: float | None = None) -> str:
    if run.get("blocks"):
        name = f"seed {run['seed']}, blocks {' '.join(map(str, run['blocks']))}"
    else:
        name = f"seed {run['seed']}, layers {' '.join(map(str, run['layers'])) or 'none'}"
    faded = f", faded to {run['fade_to']}" if run.get("fade_to", "") not in ("", "identity") else ""
    return name + faded + ("" if epochs is None else f", {epochs:g} epochs")


if __name__ == "__main__":
    main()
