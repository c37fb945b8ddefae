"""The thin programs: what they print and leave behind. `train.py` has its own file."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import PIL.Image
import pytest
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

from lambda_vit_hf.selection.select import AttentionSelection
from tests.conftest import in_two_processes


SCRIPTS = Path(__file__).parents[2] / "trainer_scripts"


def load(name: str):
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def digits_vit(tmp_path):
    config = ViTConfig(
        image_size=8, patch_size=2, hidden_size=16, num_hidden_layers=4, num_attention_heads=2, num_labels=10
    )
    ViTForImageClassification(config).save_pretrained(tmp_path / "vit")
    ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(tmp_path / "vit")
    return str(tmp_path / "vit")


@pytest.mark.parametrize("script", sorted(path.name for path in SCRIPTS.glob("*.py")))
def test_help_answers_and_shows_a_command_to_paste(script):
    # With no library to import: --help is quick.
    hidden = "" if script == "train.py" else "sys.modules['torch'] = None"  # its options are TrainingArguments'
    run = f"sys.argv = ['{script}', '--help']; runpy.run_path('{script}', run_name='__main__')"
    code = f"import sys, runpy\n{hidden}\n{run}"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=SCRIPTS)
    assert result.returncode == 0, result.stderr[-1000:]
    assert "usage" in result.stdout
    assert f"trainer_scripts/{script}" in (SCRIPTS / script).read_text().split('"""')[1]


@pytest.mark.parametrize("strategy", ["nose", "last"])
def test_select_layers_prints_and_saves_the_selection(digits_vit, tmp_path, capsys, strategy):
    load("select_layers").main(
        [digits_vit, "--dataset_name", "digits", "--num_layers", "2", "--num_images", "30", "--strategy", strategy,
         "--pairs", "--autocast", "bfloat16", "--output_dir", str(tmp_path / "out")]
    )  # fmt: skip
    selection = AttentionSelection.load(tmp_path / "out" / "selection.json")
    assert (len(selection.layers), selection.num_images, selection.strategy) == (2, 30, strategy)
    assert selection.autocast_dtype == "bfloat16"
    printed = capsys.readouterr().out
    assert f"layers {selection.layers}" in printed
    assert ("% of resamples" in printed) == (strategy == "nose")
    pictures = {"entropy.png", "pairs.png"} | ({"search.png"} if strategy == "nose" else set())
    assert {path.name for path in (tmp_path / "out").glob("*.png")} == pictures
    for name in pictures:
        PIL.Image.open(tmp_path / "out" / name).verify()


def select_into(folder: str, model: str, rank: int) -> list[str]:
    output_dir = Path(folder) / str(rank)
    load("select_layers").main(
        [model, "--dataset_name", "digits", "--num_layers", "2", "--num_images", "20", "--batch_size", "7",
         "--output_dir", str(output_dir)]
    )  # fmt: skip
    return sorted(path.name for path in output_dir.glob("*"))


def test_of_several_processes_one_reports_what_all_selected(digits_vit, tmp_path):
    found = in_two_processes(select_into, str(tmp_path), digits_vit)
    assert found == [["entropy.png", "search.png", "selection.json"], []]
    shared = AttentionSelection.load(tmp_path / "0" / "selection.json")
    select_into(str(tmp_path), digits_vit, rank=2)
    alone = AttentionSelection.load(tmp_path / "2" / "selection.json")
    assert (shared.order, shared.num_images) == (alone.order, 20)
