"""Compare ways of choosing layers: same base models, same training, several seeds; print the table, save the figures.

    python trainer_scripts/compare_selections.py trainer_scripts/recipes/digits.yaml
    python trainer_scripts/compare_selections.py trainer_scripts/recipes/digits.yaml --seeds 0 1 --strategies nose last

Every other option is passed on to train.py. Runs land in OUTPUT_DIR/seed-N/STRATEGY, figures in OUTPUT_DIR.json.
"""

import argparse
import json
import statistics
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("recipe")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--strategies", nargs="+", default=["nose", "first", "last", "random"])
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/digits_selection"))
    options, passed_on = parser.parse_known_args()

    from lambda_vit_hf.arguments import (
        DataArguments,
        LambdaTrainingArguments,
        ModelArguments,
        RemovalArguments,
        parse_arguments,
    )
    from lambda_vit_hf.training import run_training

    kinds = [ModelArguments, DataArguments, RemovalArguments, LambdaTrainingArguments]
    runs = []
    for seed in options.seeds:
        base = None
        for strategy in options.strategies:
            folder = options.output_dir / f"seed-{seed}" / strategy
            argv = [options.recipe, *passed_on, "--output_dir", str(folder), "--strategy", strategy]
            argv += ["--seed", str(seed), "--overwrite_output_dir", "--save_strategy", "no"]
            argv += ["--model_name_or_path", str(base)] if base else []
            metrics = run_training(*parse_arguments(argv, kinds))
            if base is None and (folder / "base").is_dir():
                base = folder / "base"
            runs.append({"seed": seed, "strategy": strategy, **metrics})

    table = [
        {
            "strategy": strategy,
            "base": [run["before"]["top1"] for run in runs if run["strategy"] == strategy],
            "removed": [run["after"]["top1"] for run in runs if run["strategy"] == strategy],
            "layers": [run["layers"] for run in runs if run["strategy"] == strategy],
        }
        for strategy in options.strategies
    ]
    results = {"recipe": Path(options.recipe).name, "seeds": options.seeds, "environment": runs[0]["environment"]}
    path = options.output_dir.with_suffix(".json")
    path.write_text(json.dumps({**results, "strategies": table}, indent=2) + "\n", encoding="utf-8")
    print_table(table)
    print(f"\nFigures in {path}")


def print_table(table: list[dict]) -> None:
    print(f"\n| layers chosen | top-1 before (%) | top-1 after (%) | change | layers, seed by seed |\n|{'---|' * 5}")
    for row in table:
        before, after = (statistics.mean(row[name]) * 100 for name in ("base", "removed"))
        spread = statistics.stdev(row["removed"]) * 100 if len(row["removed"]) > 1 else 0.0
        layers = "; ".join(" ".join(map(str, chosen)) for chosen in row["layers"])
        print(f"| {row['strategy']} | {before:.2f} | {after:.2f} ± {spread:.2f} | {after - before:+.2f} | {layers} |")


if __name__ == "__main__":
    main()
