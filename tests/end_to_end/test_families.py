"""Every family through the program: NOSE picks, lambda falls; the rest is saved, opened elsewhere, exported."""

import json
import subprocess
import sys

import numpy as np
import onnxruntime
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageClassification, ViTImageProcessor

from lambda_vit_hf.export.serving_folder import export_for_serving
from lambda_vit_hf.training.arguments import PROGRAM_ARGUMENTS, parse_arguments
from lambda_vit_hf.training.run import run_training


TINY = dict(image_size=8, patch_size=2, hidden_size=16, num_hidden_layers=3, num_attention_heads=2)
MLP = dict(**TINY, intermediate_size=32)
TEXT = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=50)
# As on the Hub: encoders without a head of digits, towers within models of images and texts.
CHECKPOINTS = {
    "vit": lambda t: t.ViTModel(t.ViTConfig(**MLP)),
    "deit": lambda t: t.DeiTModel(t.DeiTConfig(**MLP)),
    "dinov2": lambda t: t.Dinov2Model(t.Dinov2Config(**TINY)),
    "dinov2_with_registers": lambda t: t.Dinov2WithRegistersModel(t.Dinov2WithRegistersConfig(**TINY)),
    "dinov3_vit": lambda t: t.DINOv3ViTModel(t.DINOv3ViTConfig(**MLP, num_register_tokens=2, use_gated_mlp=True)),
    "siglip": lambda t: t.SiglipModel(t.SiglipConfig(vision_config=MLP, text_config=TEXT)),
    "clip": lambda t: t.CLIPModel(t.CLIPConfig(vision_config=MLP, text_config=TEXT)),
}
OPTIONS = """--use_cpu true --base_num_train_epochs 0.3 --max_steps 4 --per_device_train_batch_size 64
--calibration_size 32 --num_removed_layers 2 --hold_share 0.5 --report_to none --save_strategy no --eval_strategy no
--ignore_mismatched_sizes true --dataset_name digits --warmup_steps 0 --learning_rate 1e-3 --base_learning_rate 1e-3
""".split()
WITHOUT_PACKAGE = """
import json, sys
sys.modules["lambda_vit_hf"] = None  # as if it were not installed
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageClassification

pixel_values = load_file(sys.argv[1])["pixel_values"]
found = {}
for name, folder in json.loads(sys.argv[3]).items():
    model = AutoModelForImageClassification.from_pretrained(folder, trust_remote_code=True)
    with torch.no_grad():
        found[name] = model(pixel_values).logits
save_file(found, sys.argv[2])
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Folder and metrics of a run of the program, by family."""
    runs = {}
    for name, make in CHECKPOINTS.items():
        folder = tmp_path_factory.mktemp(name)
        torch.manual_seed(0)
        make(transformers).save_pretrained(folder / "checkpoint")
        ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(folder / "checkpoint")
        argv = [*OPTIONS, "--model_name_or_path", str(folder / "checkpoint"), "--output_dir", str(folder / "run")]
        runs[name] = folder / "run", run_training(*parse_arguments(argv, PROGRAM_ARGUMENTS))
    return runs


@pytest.fixture(scope="module")
def pixel_values():
    return torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="module")
def logits(finished, pixel_values):
    models = {name: AutoModelForImageClassification.from_pretrained(folder) for name, (folder, _) in finished.items()}
    with torch.no_grad():
        return {name: (model, model(pixel_values).logits) for name, model in models.items()}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_the_saved_model_is_removed_folded_and_measured(finished, logits, name):
    folder, metrics = finished[name]
    model, _ = logits[name]
    assert model.config.removed_layers == metrics["layers"] and len(metrics["layers"]) == 2
    assert model.config.fold_removed and type(model).__name__.endswith("ForImageClassification")
    assert sum(p.numel() for p in model.parameters()) == metrics["after"]["parameters"]
    assert metrics["after"]["parameters"] < metrics["before"]["parameters"]
    assert metrics["after"]["macs"] < metrics["before"]["macs"]
    assert json.loads((folder / "selection.json").read_text())["layers"] == metrics["layers"]
    assert (folder / "entropy.png").is_file() and "Removed" in (folder / "README.md").read_text()


def test_every_family_opens_without_the_package(finished, logits, pixel_values, tmp_path):
    save_file({"pixel_values": pixel_values}, tmp_path / "images.safetensors")
    folders = json.dumps({name: str(folder) for name, (folder, _) in finished.items()})
    paths = [str(tmp_path / name) for name in ("images.safetensors", "logits.safetensors")]
    run = subprocess.run([sys.executable, "-c", WITHOUT_PACKAGE, *paths, folders], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    found = load_file(paths[1])
    assert [name for name in CHECKPOINTS if not torch.equal(found[name], logits[name][1])] == []


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_the_export_gives_the_same_logits(logits, pixel_values, tmp_path, name):
    model, expected = logits[name]
    processor, folder = ViTImageProcessor(size={"height": 8, "width": 8}), tmp_path / "export"
    export_for_serving(model.eval().prepare_for_inference(), processor, folder, int8=True, fp16=True)
    session = onnxruntime.InferenceSession(folder / "onnx" / "model.onnx", providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"pixel_values": pixel_values.numpy()})
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-4, atol=1e-4)
