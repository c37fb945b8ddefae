"""The examples run as they stand, with fewer epochs."""

import runpy
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

from lambda_vit_hf import LambdaViTForImageClassification


EXAMPLES = Path(__file__).parents[1] / "examples"


def test_the_plain_trainer_leaves_a_removed_model_that_the_pipeline_opens(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["plain_trainer.py", "--epochs", "1", "--output_dir", str(tmp_path)])
    runpy.run_path(str(EXAMPLES / "plain_trainer.py"), run_name="__main__")
    assert "the pipeline says" in capsys.readouterr().out
    config = LambdaViTForImageClassification.from_pretrained(tmp_path).config
    assert len(config.removed_layers) == 6 and config.fold_removed


def test_the_notebook_runs_from_top_to_bottom(monkeypatch):
    monkeypatch.setenv("EPOCHS", "1")
    notebook = nbformat.read(EXAMPLES / "digits.ipynb", as_version=4)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(EXAMPLES.parent)}}).execute()
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    pictures = [output for cell in cells for output in cell.outputs if "image/png" in output.get("data", {})]
    assert len(pictures) == 3
    assert "'score'" in cells[-1].outputs[-1]["data"]["text/plain"]
