"""How every program runs: one parser, one form of error."""

import argparse
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path


# Their exceptions are about what they were given: a repository, a data set, a file, a recipe.
_LIBRARIES = ("datasets", "httpx", "httpx2", "huggingface_hub", "requests", "safetensors", "yaml")
_EXTRAS = {
    "train": ("accelerate", "datasets", "evaluate", "jinja2", "matplotlib", "scipy", "sklearn", "timm"),
    "export": ("onnx", "onnxruntime", "onnxscript"),
    "openvino": ("openvino",),
}


def program_parser(name: str, description: str | None) -> argparse.ArgumentParser:
    """The parser of `lambda-vit NAME`, whichever way it was started."""
    return argparse.ArgumentParser(
        prog=f"lambda-vit {name}", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )


class Renamed(argparse.Action):
    """Stores a value; every spelling of the option but the first is an old name, accepted for one release."""

    def __call__(self, parser, namespace, values, option_string=None):
        name = self.option_strings[0]
        if option_string != name:
            message = f"{option_string} is called {name} now; the old name goes with the next release."
            warnings.warn(message, FutureWarning, stacklevel=2)
        setattr(namespace, self.dest, values)


def check_output_dir(folder: Path) -> None:
    """
    Raises:
        FileExistsError: if a folder to write is there already, and is not an empty folder.
    """
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise FileExistsError(f"{folder} exists and is not an empty folder. Name another --output_dir.")


def run_program(name: str, main: Callable[[Sequence[str] | None], object], argv: Sequence[str] | None = None) -> None:
    """
    Run a program. What is wrong with its input becomes one line on stderr and exit status 2; any other exception is a
    bug, and its traceback is shown. With `LAMBDA_VIT_DEBUG=1` in the environment, every traceback is.

    Args:
        name (`str`): of the command, for the message.
        main (`Callable`): the program; takes the command line.
        argv (`Sequence[str]`, *optional*): command line without the program's name, by default that of the process.
    """
    try:
        main(argv)
    except Exception as error:
        if os.environ.get("LAMBDA_VIT_DEBUG") == "1" or not is_about_input(error):
            raise
        message = f"{error}{missing_extra(error)}" or type(error).__name__
        print(f"lambda-vit {name}: error: {' '.join(message.split())}", file=sys.stderr)
        raise SystemExit(2) from None


def is_about_input(error: Exception) -> bool:
    """Whether an exception says that an input, a file, the Hub or an installation is not what it should be."""
    if isinstance(error, (ValueError, OSError, ImportError, FloatingPointError)):
        return True
    return any(kind.__module__.partition(".")[0] in _LIBRARIES for kind in type(error).__mro__)


def missing_extra(error: BaseException | None) -> str:
    """How to install the library that an exception misses; empty if it misses none of an extra's."""
    while error is not None:
        library = (getattr(error, "name", None) or "").partition(".")[0] if isinstance(error, ImportError) else ""
        for extra, libraries in _EXTRAS.items():
            if library in libraries:
                return f" Install what this program needs besides: pip install 'lambda-vit-hf[{extra}]'"
        error = error.__cause__
    return ""
