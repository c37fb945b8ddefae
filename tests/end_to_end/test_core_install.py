"""What works without the `train` extra: a served model, a selection and an export need nothing of it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import ViTImageProcessor

from lambda_vit_hf import LambdaViTConfig, LambdaViTForImageClassification
from tests.conftest import TINY


# One process for all, for it takes seconds to start; each function's answer, or its error, goes to stdout.
CORE_ONLY = """
import json, sys, traceback

for name in ("accelerate", "datasets", "evaluate", "jinja2", "matplotlib", "peft", "sklearn", "timm"):
    sys.modules[name] = None  # as if it were not installed
import lambda_vit_hf
print("imported", file=sys.stderr)

import PIL.Image
import torch
from transformers import pipeline

folder, output_dir = sys.argv[1:]

def need():
    assert lambda_vit_hf.summarize
    try:
        from lambda_vit_hf import EntropyGuidedRemovalCallback
    except ImportError as error:
        return str(error)

def serve():
    return len(pipeline("image-classification", model=folder)(PIL.Image.new("RGB", (20, 20))))

def select():
    model = lambda_vit_hf.LambdaViTForImageClassification.from_pretrained(folder)
    return lambda_vit_hf.select_attention_layers(model, torch.randn(8, 3, 16, 16), num_removed_layers=1).layers

def export():
    from lambda_vit_hf.cli.export import main
    main([folder, "--output_dir", output_dir, "--int8"])

found = {}
for function in (need, serve, select, export):
    try:
        found[function.__name__] = function()
    except Exception:
        found[function.__name__] = traceback.format_exc()
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def core(tmp_path_factory):
    """What the core alone answers, by function; with the folder it exported into, and what an import wrote."""
    folder = tmp_path_factory.mktemp("core")
    torch.manual_seed(0)
    model = LambdaViTForImageClassification(LambdaViTConfig(**TINY))
    model.remove_attention([0, 2])
    model.save_pretrained(folder / "model")
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder / "model")
    command = [sys.executable, "-c", CORE_ONLY, str(folder / "model"), str(folder / "exported")]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    said = result.stderr.partition("imported\n")[0]
    return {**json.loads(result.stdout.splitlines()[-1]), "exported": folder / "exported", "said": said}


def test_importing_it_says_nothing(core):
    assert core["said"] == ""


def test_without_the_extra_the_callback_says_which_one_it_needs(core):
    assert "pip install 'lambda-vit-hf[train]'" in core["need"]


def test_the_core_alone_serves_and_selects(core):
    assert core["serve"] == 5
    assert len(core["select"]) == 1 and core["select"][0] in (1, 3, 4, 5)


def test_without_a_dataset_the_extra_export_is_enough(core):
    assert core["export"] is None, core["export"]
    assert (Path(core["exported"]) / "onnx" / "model.onnx").is_file()
