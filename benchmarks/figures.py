"""Programs that measure one base model of a recipe, or print again what they have measured before."""

import argparse
import json
import shlex
import sys
from collections.abc import Callable
from pathlib import Path


def read_recipe_or_figures(
    parser: argparse.ArgumentParser, argv: list[str] | None
) -> tuple[argparse.Namespace, list[str]]:
    """A program's own options, with `recipe` and `base_model`, and those that override fields of the recipe."""
    parser.add_argument("recipe", help="a YAML file; or figures of an earlier run (JSON)")
    parser.add_argument("--base_model", help="a trained classifier with all its attention")
    options, overrides = parser.parse_known_args(argv)
    if not options.recipe.endswith(".json") and options.base_model is None:
        parser.error("--base_model is missing")
    return options, overrides


def measured_or_read(
    program: str,
    measure: Callable[[argparse.Namespace, list[str]], dict],
    options: argparse.Namespace,
    overrides: list[str],
    argv: list[str] | None,
) -> dict:
    """The figures of `options.recipe`, if that is a JSON file; else what `measure` gives, written to OUTPUT.json."""
    if options.recipe.endswith(".json"):
        return json.loads(Path(options.recipe).read_text(encoding="utf-8"))
    figures = measure(options, overrides)
    figures["command"] = shlex.join(["python", "-m", program, *(argv or sys.argv[1:])])
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.with_suffix(".json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    return figures
