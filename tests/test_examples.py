"""The examples run as they stand, with fewer epochs and fewer images to choose layers on."""

import runpy
import sys
from functools import partial
from pathlib import Path

import nbformat
from nbclient import NotebookClient

import lambda_vit_hf
from lambda_vit_hf import EntropyGuidedRemovalCallback, LambdaViTForImageClassification


EXAMPLES = Path(__file__).parents[1] / "examples"


def test_the_plain_trainer_leaves_a_removed_model_that_the_pipeline_opens(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["plain_trainer.py", "--epochs", "0.3", "--output_dir", str(tmp_path)])
    few_images = partial(EntropyGuidedRemovalCallback, calibration_size=64)
    monkeypatch.setattr(lambda_vit_hf, "EntropyGuidedRemovalCallback", few_images)
    runpy.run_path(str(EXAMPLES / "plain_trainer.py"), run_name="__main__")
    assert "the pipeline says" in capsys.readouterr().out
    config = LambdaViTForImageClassification.from_pretrained(tmp_path).config
    assert len(config.removed_layers) == 6 and config.fold_removed


def test_the_notebook_runs_from_top_to_bottom(monkeypatch):
    monkeypatch.setenv("EPOCHS", "0.3")
    notebook = nbformat.read(EXAMPLES / "digits.ipynb", as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    (chooses,) = (cell for cell in cells if "calibration_size=512" in cell.source)
    chooses.source = chooses.source.replace("calibration_size=512", "calibration_size=64")
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(EXAMPLES.parent)}}).execute()
    pictures = [output for cell in cells for output in cell.outputs if "image/png" in output.get("data", {})]
    assert len(pictures) == 3
    assert "'score'" in cells[-1].outputs[-1]["data"]["text/plain"]
