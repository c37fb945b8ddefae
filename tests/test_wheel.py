"""What an installation brings: the package with everything it reads, its command, and nothing else."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]
PACKAGES = ("cli", "data", "evaluation", "export", "hub", "models", "selection", "training")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built from a copy of this checkout without network."""
    folder = tmp_path_factory.mktemp("wheel")
    unneeded = shutil.ignore_patterns(".*", "outputs", "results", "docs", "build", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, folder / "source", ignore=unneeded)
    command = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "--no-index", "--quiet",
               "--wheel-dir", str(folder), str(folder / "source")]  # fmt: skip
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    with zipfile.ZipFile(next(folder.glob("lambda_vit_hf-*.whl"))) as archive:
        yield archive


def test_the_wheel_has_every_module_of_every_package(wheel):
    names = set(wheel.namelist())
    sources = [path for package in PACKAGES for path in (ROOT / "lambda_vit_hf" / package).rglob("*.py")]
    assert len(sources) > 60
    missing = [str(path) for path in sources if path.relative_to(ROOT).as_posix() not in names]
    assert missing == []


def test_the_wheel_has_recipes_launch_configs_card_template_and_type_marker(wheel):
    names = set(wheel.namelist())
    for path in (ROOT / "trainer_scripts").glob("*/*.yaml"):
        assert f"lambda_vit_hf/{path.parent.name}/{path.name}" in names
    assert {"lambda_vit_hf/model_cards/model_card.md.jinja", "lambda_vit_hf/py.typed"} <= names


def test_the_wheel_installs_the_command(wheel):
    assert "lambda_vit_cli.py" in wheel.namelist()
    (entry_points,) = (name for name in wheel.namelist() if name.endswith("entry_points.txt"))
    assert "lambda-vit = lambda_vit_cli:main" in wheel.read(entry_points).decode()


def test_nothing_is_installed_beside_the_package(wheel):
    at_the_top = {name.split("/")[0] for name in wheel.namelist()}
    metadata = {name for name in at_the_top if name.endswith(".dist-info")}
    assert len(metadata) == 1 and at_the_top - metadata == {"lambda_vit_hf", "lambda_vit_cli.py"}


INSTALLED = """
import sys

sys.path.insert(0, sys.argv[1])  # a wheel of Python files can be imported as it is unpacked
import lambda_vit_hf
from lambda_vit_hf.training.recipes import find_recipe, known_recipes

assert lambda_vit_hf.__file__.startswith(sys.argv[1])
assert find_recipe("digits").is_file() and str(find_recipe("digits")).startswith(sys.argv[1])
print(len(known_recipes()))
"""


def test_installed_recipes_are_found_by_name(wheel, tmp_path):
    wheel.extractall(tmp_path)
    command = [sys.executable, "-c", INSTALLED, str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr[-2000:]
    assert int(result.stdout) == len(list((ROOT / "trainer_scripts" / "recipes").glob("*.yaml")))
