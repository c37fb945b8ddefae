"""The recipes: what they say is what the paper's recipe is, and the ImageNet one runs from end to end, in small."""

import json
import math
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from transformers import DeiTImageProcessor, ViTConfig, ViTForImageClassification, pipeline

from lambda_vit_hf import LambdaViTForImageClassification
from lambda_vit_hf.training.arguments import PROGRAM_ARGUMENTS, parse_arguments
from lambda_vit_hf.training.dilution import DilutionSchedule
from lambda_vit_hf.training.run import run_training
from tests.conftest import in_two_processes
from tests.miniature_imagenet import CLASSES, miniature_images, write_class_folders, write_parquet


ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "trainer_scripts" / "recipes").glob("*.yaml"))
BASE = ROOT / "trainer_scripts" / "recipes" / "deit_base_imagenet.yaml"
CONFIGS = sorted((ROOT / "trainer_scripts" / "accelerate_configs").glob("*.yaml"))
# Shorter in epochs, images and what follows from these two; narrower by the checkpoint it starts from.
SHORTENED = """
--num_train_epochs 4 --warmup_epochs 1 --ema_decay 0.8 --per_device_eval_batch_size 32 --dataloader_num_workers 0
--calibration_size 32 --logging_steps 1 --save_total_limit 1 --use_cpu true --disable_tqdm true
""".split()


def read(recipe: Path, *argv: str) -> dict:
    """All fields of a recipe by name."""
    return {
        name: value
        for one in parse_arguments([str(recipe), "--use_cpu", "true", *argv], PROGRAM_ARGUMENTS)
        for name, value in vars(one).items()
    }


def test_there_are_recipes():
    assert len(RECIPES) >= 6, "the tests below would test nothing"


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_is_complete_and_its_header_has_the_command(recipe):
    fields = read(recipe)
    removal = ("removal_ratio", "num_removed_layers", "removed_layers")
    assert sum(fields[name] is not None for name in removal) == 1
    assert sum(fields[name] is not None for name in ("dataset_name", "dataset_dir")) <= 1
    assert fields["output_dir"] == f"outputs/{recipe.stem}"
    header = recipe.read_text().split("\n\n")[0]
    assert f"train {recipe.stem} " in header.replace("\n", " ")
    assert "easured" in header or recipe.stem == "digits"


def test_the_recipe_for_checkpoints_leaves_them_their_shape():
    fields = yaml.safe_load(BASE.with_name("finetune.yaml").read_text())
    shape = {"image_size", "patch_size", "hidden_size", "num_hidden_layers", "num_attention_heads",
             "intermediate_size", "evaluation_crop", "model_name_or_path", "dataset_name"}  # fmt: skip
    assert shape & set(fields) == set()


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_accelerate_reads_each_of_its_config_files(config):
    loaded = load_config_from_file(str(config))
    settings = yaml.safe_load(config.read_text())
    assert loaded.num_processes == settings["num_processes"]
    assert loaded.mixed_precision == settings["mixed_precision"]


@pytest.mark.parametrize(
    ("size", "ratio", "layers", "drop_path"),
    [("base", 0.4, 5, "constant"), ("small", 0.25, 3, "linear"), ("tiny", 0.25, 3, "linear")],
)
def test_the_imagenet_recipes_are_the_papers(size, ratio, layers, drop_path):
    fields = read(BASE.with_name(f"deit_{size}_imagenet.yaml"))
    assert fields["removal_ratio"] == ratio and int(12 * ratio + 0.5) == layers
    assert fields["model_name_or_path"] == f"facebook/deit-{size}-patch16-224"
    # On 8 GPUs: 2,048 images a step.
    steps_per_epoch = math.ceil(1_281_167 / (8 * fields["per_device_train_batch_size"]))
    epochs = int(fields["num_train_epochs"])
    schedule = DilutionSchedule(
        epochs * steps_per_epoch, fields["hold_share"], fields["schedule"],
        steps_per_epoch if fields["granularity"] == "epoch" else 1,
    )  # fmt: skip
    for epoch in range(epochs):
        paper = max(0.0, 1 - epoch / 299)
        for step in (epoch * steps_per_epoch, (epoch + 1) * steps_per_epoch - 1):
            assert schedule.at(step) == pytest.approx(paper, abs=1e-12), f"lambda in epoch {epoch}"
    expected = {
        "learning_rate": 5e-4, "learning_rate_batch_size": 512, "min_learning_rate": 1e-5, "warmup_epochs": 5,
        "warmup_learning_rate": 1e-6, "weight_decay": 0.05, "max_grad_norm": 0, "drop_path_rate": 0.1,
        "drop_path_schedule": drop_path, "label_smoothing_factor": 0.1, "mixup": 0.8, "cutmix": 1.0,
        "mixup_switch_prob": 0.5, "auto_augment": "rand-m9-mstd0.5-inc1", "color_jitter": 0.3,
        "random_erasing": 0.25, "random_erasing_mode": "pixel", "repeated_augmentation": 3, "ema_decay": 0.99996,
        "adam_epsilon": 1e-8, "bf16": True, "evaluation_crop": 0.875,
    }  # fmt: skip
    assert {name: fields[name] for name in expected} == expected


# From end to end


@pytest.fixture(scope="module")
def narrow_deit(tmp_path_factory):
    """A ViT of 12 layers and patches of 16 like DeiT, but of 64 pixels and 24 wide, with DeiT's image processor."""
    folder = tmp_path_factory.mktemp("deit")
    torch.manual_seed(0)
    config = ViTConfig(
        image_size=64, hidden_size=24, num_attention_heads=3, intermediate_size=48, id2label=dict(enumerate(CLASSES)),
        label2id={name: index for index, name in enumerate(CLASSES)},
    )  # fmt: skip
    ViTForImageClassification(config).save_pretrained(folder)
    sides = {name: {"height": side, "width": side} for name, side in (("size", 73), ("crop_size", 64))}
    DeiTImageProcessor(**sides).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A miniature ImageNet as parquet files and as folders; one image of each training set is cut off."""
    folder = tmp_path_factory.mktemp("miniature")
    return {
        "parquet": write_parquet(folder / "parquet", 4, 2, num_shards=4, truncated=1),
        "folders": write_class_folders(folder / "folders", 4, 2, truncated=1),
    }


def train(argv: list[str], rank: int = 0) -> None:
    run_training(*parse_arguments(argv, PROGRAM_ARGUMENTS))


def launch(argv: list[str]) -> None:
    config = ROOT / "trainer_scripts" / "accelerate_configs" / "two_cpu_processes.yaml"
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
    command += ["--main_process_port", "0", "-m", "lambda_vit_hf.cli.train", *argv]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr[-3000:]


# Every pair of number of processes, kind and streaming, in half as many runs as all of them together.
@pytest.mark.parametrize(
    ("how", "num_processes", "kind", "streaming"),
    [
        (train, 1, "parquet", False),
        (train, 1, "folders", True),
        (launch, 2, "parquet", True),
        (partial(in_two_processes, train), 2, "folders", False),
    ],
    ids=["parquet", "streamed folders", "two launched processes, streamed parquet", "two processes, folders"],
)
def test_the_base_recipe_runs_from_end_to_end(narrow_deit, images, tmp_path, how, num_processes, kind, streaming):
    out = tmp_path / "out"
    argv = [
        str(BASE), "--model_name_or_path", str(narrow_deit), "--dataset_dir", str(images[kind]),
        "--output_dir", str(out), *SHORTENED, "--per_device_train_batch_size", str(16 // num_processes),
        *(["--streaming", "true", "--repeated_augmentation", "1"] if streaming else []),
    ]  # fmt: skip
    how(argv)
    metrics = json.loads((out / "metrics.json").read_text())
    state = json.loads((next(out.glob("checkpoint-*")) / "trainer_state.json").read_text())
    assert [state["log_history"][-1]["lambda"], len(metrics["layers"])] == [0, 5]
    lambdas = {round(entry["epoch"], 2): entry["lambda"] for entry in state["log_history"] if "loss" in entry}
    assert sorted(set(lambdas.values())) == [0, 0.5, 1]
    assert metrics["unreadable_images"]["validation"] == 0
    if not streaming:
        assert metrics["unreadable_images"]["train"] == 1
    model = LambdaViTForImageClassification.from_pretrained(out)
    assert model.config.removed_layers == metrics["layers"] and model.config.fold_removed
    assert model.config.id2label == dict(enumerate(CLASSES))
    card = (out / "README.md").read_text()
    assert "average over training (EMA, decay 0.8)" in card
    _, name, content = next(miniature_images("validation", 1))
    (tmp_path / name).write_bytes(content)
    answer = pipeline("image-classification", model=str(out))(str(tmp_path / name))
    assert {entry["label"] for entry in answer} <= set(CLASSES)
