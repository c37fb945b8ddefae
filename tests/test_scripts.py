"""The thin programs: what they print and leave behind. `train.py` has its own file."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import PIL.Image
import pytest
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

from lambda_vit_hf.selection import AttentionSelection


SCRIPTS = Path(__file__).parent.parent / "trainer_scripts"


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
         "--output_dir", str(tmp_path / "out")]
    )  # fmt: skip
    selection = AttentionSelection.load(tmp_path / "out" / "selection.json")
    assert (len(selection.layers), selection.num_images, selection.strategy) == (2, 30, strategy)
    assert f"layers {selection.layers}" in capsys.readouterr().out
    PIL.Image.open(tmp_path / "out" / "entropy.png").verify()


def test_compare_selections_trains_each_strategy_from_the_same_base(tmp_path, capsys, monkeypatch):
    small = [
        "--hidden_size", "16", "--num_hidden_layers", "3", "--num_attention_heads", "2", "--intermediate_size", "32",
        "--base_num_train_epochs", "0.5", "--num_train_epochs", "0.5", "--num_layers", "1", "--eval_strategy", "no",
        "--per_device_train_batch_size", "128", "--calibration_size", "32", "--use_cpu", "true", "--warmup_steps", "0",
    ]  # fmt: skip
    argv = ["compare_selections.py", str(SCRIPTS / "recipes" / "digits.yaml"), "--seeds", "0", "1"]
    argv += ["--strategies", "nose", "first", "--output_dir", str(tmp_path / "runs"), *small]
    monkeypatch.setattr(sys, "argv", argv)
    load("compare_selections").main()
    results = json.loads((tmp_path / "runs.json").read_text())
    nose, first = results["strategies"]
    assert nose["base"] == first["base"], "the strategies started from different models"
    assert first["layers"] == [[0], [0]]
    assert "| first |" in capsys.readouterr().out
