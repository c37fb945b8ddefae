"""Recipes: YAML files that set fields of the training program; some are installed with the package."""

import math
from argparse import Action, ArgumentParser, ArgumentTypeError
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path

import yaml


def known_recipes() -> dict[str, Path]:
    """The recipes that come with the package, by name."""
    return {path.stem: path for path in sorted(shipped_files("recipes").glob("*.yaml"))}


def shipped_files(folder: str) -> Path:
    """A folder of `trainer_scripts/`: installed inside the package, and used in place by a checkout."""
    package = Path(str(resources.files(__package__.partition(".")[0])))
    installed = package / folder
    return installed if installed.is_dir() else package.parent / "trainer_scripts" / folder


def find_recipe(name_or_path: str) -> Path:
    """
    The file of a recipe: the name of a known one, or a path.

    Raises:
        FileNotFoundError: if there is no such recipe; names the known ones.
    """
    known = known_recipes()
    if name_or_path in known:
        return known[name_or_path]
    path = Path(name_or_path)
    if not path.is_file():
        raise FileNotFoundError(
            f"The recipe {name_or_path} does not exist. Give the path of a YAML file, or one of {', '.join(known)}."
        )
    return path


def read_recipe(path: Path) -> dict:
    """
    Fields and values of a recipe's file.

    Raises:
        ValueError: if the file is no YAML, is not a mapping, or names a field twice.
    """
    try:
        with path.open(encoding="utf-8") as file:
            recipe = yaml.load(file, Loader=_Loader)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"The recipe {path} cannot be read as YAML: {' '.join(str(error).split())}") from error
    if not isinstance(recipe, dict):
        raise ValueError(f"The recipe {path} must map fields to values, got {type(recipe).__name__}.")
    return recipe


class _Loader(yaml.SafeLoader):
    """YAML's safe loader, of which the last of several equal keys would win without a word."""

    def construct_mapping(self, node, deep=False):
        keys = [key for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]  # `<<`, which names no field
        names = [self.construct_object(key, deep=True) for key in keys]
        twice = sorted({str(name) for name in names if names.count(name) > 1})
        if twice:
            place = f"{node.start_mark.name}, from line {node.start_mark.line + 1} on,"
            raise ValueError(f"The recipe {place} names {twice} twice: which one is meant?")
        return super().construct_mapping(node, deep)


def take_recipe(argv: Sequence[str], parser: ArgumentParser) -> tuple[str | None, list[str]]:
    """
    The one word of a command line that is neither an option nor an option's value, and the rest.

    argparse cannot tell: an option that takes any number of values, or an optional one, would swallow a recipe after
    it. So a word belongs to such an option only if the option can read it.

    Raises:
        ValueError: if there are several such words.
    """
    recipes, rest, takes = [], [], None
    for word in argv:
        if word.startswith("--") or word == "-h":
            takes = None if "=" in word else _reader(word, parser)
        elif takes is None or not takes(word):
            recipes.append(word)
            continue
        rest.append(word)
    if len(recipes) > 1:
        raise ValueError(f"Give one recipe, not {recipes}.")
    return (recipes[0] if recipes else None), rest


def _reader(option: str, parser: ArgumentParser) -> Callable[[str], bool]:
    """Tells whether the next word is a value of an option. To an unknown option, which is refused later, all are."""
    found = {id(action): action for name, action in parser._option_string_actions.items() if name.startswith(option)}
    action = parser._option_string_actions.get(option) or next(iter(found.values()), None)
    values_left = {None: 1, 0: 0, "?": 1}.get(action.nargs, math.inf) if action else math.inf

    def takes(word: str) -> bool:
        nonlocal values_left
        values_left -= 1
        return values_left >= 0 and (action is None or action.nargs is None or _can_read(action, word))

    return takes


def _can_read(action: Action, word: str) -> bool:
    try:
        (action.type or str)(word)
    except (ValueError, ArgumentTypeError):
        return False
    return True
