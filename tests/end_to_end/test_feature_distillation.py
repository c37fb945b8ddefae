"""The training program without labels: an encoder and a folder of pictures in, a smaller encoder out."""

import json
import shutil

import PIL.Image
import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoImageProcessor,
    AutoModel,
    Dinov2Config,
    Dinov2Model,
    ViTConfig,
    ViTImageProcessor,
    ViTModel,
)

from lambda_vit_hf.data.folders import load_digits
from lambda_vit_hf.training.arguments import PROGRAM_ARGUMENTS, parse_arguments
from lambda_vit_hf.training.finishing import finish_checkpoint
from lambda_vit_hf.training.run import run_training
from tests.conftest import in_two_processes


pytestmark = pytest.mark.slow

SHAPE = dict(image_size=8, patch_size=2, hidden_size=16, num_hidden_layers=4, num_attention_heads=2)
OPTIONS = """dinov2_small_feature_distillation --image_size 8 --random_resized_crop false --num_removed_layers 2
--calibration_size 32 --max_steps 12 --eval_steps 6 --save_steps 4 --save_total_limit 9 --warmup_steps 0
--per_device_train_batch_size 16 --learning_rate 1e-3 --use_cpu true""".split()


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """80 pictures in two folders that are no classes."""
    folder = tmp_path_factory.mktemp("pictures")
    for number, image in enumerate(load_digits()["train"].select(range(80))["image"]):
        path = folder / ("some" if number % 3 else "others/deeper") / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    torch.manual_seed(0)
    Dinov2Model(Dinov2Config(**SHAPE, mlp_ratio=2)).save_pretrained(folder)
    ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(folder)
    return folder


def run(checkpoint, pictures, out, *arguments) -> dict:
    argv = [
        *OPTIONS,
        "--model_name_or_path",
        str(checkpoint),
        "--dataset_dir",
        str(pictures),
        "--output_dir",
        str(out),
    ]
    return run_training(*parse_arguments([*argv, *map(str, arguments)], PROGRAM_ARGUMENTS))


@pytest.fixture(scope="module")
def finished(checkpoint, pictures, tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished") / "out"
    return folder, run(checkpoint, pictures, folder)


def test_the_folder_holds_the_smaller_encoder_with_its_card_and_figures(finished):
    folder, metrics = finished
    model = AutoModel.from_pretrained(folder)
    assert type(model).__name__ == "LambdaDinov2Model"
    assert model.config.removed_layers == metrics["layers"] and len(metrics["layers"]) == 2
    assert model.config.fold_removed and AutoImageProcessor.from_pretrained(folder)
    before, after = metrics["before"], metrics["after"]
    assert sum(p.numel() for p in model.parameters()) == after["parameters"] < before["parameters"]
    assert after["macs"] < before["macs"]
    assert (before["image_cosine"], before["patch_cosine"]) == (1.0, 1.0)
    assert 0 < after["image_cosine"] < 1 and 0 < after["patch_cosine"] < 1
    card = (folder / "README.md").read_text()
    assert f"| image features, cosine | 1.0000 | {after['image_cosine']:.4f} |" in card
    assert "without labels" in card and "pipeline_tag: image-feature-extraction" in card
    assert "AutoModel.from_pretrained" in card and "top-1" not in card
    for picture in ("entropy.png", "training.png"):
        PIL.Image.open(folder / picture).verify()
    assert json.loads((folder / "selection.json").read_text())["config"]["output"] == "class_token"


def test_resumed_in_the_middle_it_ends_in_the_same_weights(finished, checkpoint, pictures, tmp_path):
    expected = load_file(finished[0] / "model.safetensors")
    run(checkpoint, pictures, tmp_path / "again", "--resume_from_checkpoint", finished[0] / "checkpoint-4")
    resumed = load_file(tmp_path / "again" / "model.safetensors")
    assert resumed.keys() == expected.keys()
    assert [name for name, value in resumed.items() if not torch.equal(value, expected[name])] == []


def test_its_last_checkpoint_can_be_finished(finished, tmp_path):
    finish_checkpoint(finished[0] / "checkpoint-12", tmp_path / "finished")
    expected = load_file(finished[0] / "model.safetensors")
    found = load_file(tmp_path / "finished" / "model.safetensors")
    assert all(torch.equal(value, expected[name]) for name, value in found.items())


def test_images_are_streamed_too_and_an_average_is_kept(checkpoint, pictures, tmp_path):
    splits = tmp_path / "splits"
    splits.mkdir()
    for split in ("train", "validation"):
        shutil.copytree(pictures, splits / split)
    metrics = run(checkpoint, splits, tmp_path / "out", "--streaming", "true", "--ema_decay", "0.5",
                  "--save_strategy", "no")  # fmt: skip
    assert 0 < metrics["after"]["image_cosine"] < 1


def run_in_one_of_two(checkpoint: str, pictures: str, out: str, options: list, rank: int) -> None:
    run(checkpoint, pictures, out, *options)


def test_two_processes_train_one_encoder(checkpoint, pictures, tmp_path):
    """DINOv2 has a mask token, which no loss here reaches: DistributedDataParallel would wait for its gradient."""
    options = ["--max_steps", 2, "--hold_share", 0.5, "--save_strategy", "no", "--eval_strategy", "no"]
    in_two_processes(run_in_one_of_two, str(checkpoint), str(pictures), str(tmp_path / "out"), options)
    assert len(AutoModel.from_pretrained(tmp_path / "out").config.removed_layers) == 2


def test_a_random_pooler_is_not_shipped_as_trained(pictures, tmp_path):
    torch.manual_seed(0)
    vit = ViTModel(ViTConfig(**SHAPE, intermediate_size=32), add_pooling_layer=False)
    vit.save_pretrained(tmp_path / "vit")
    ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(tmp_path / "vit")
    run(tmp_path / "vit", pictures, tmp_path / "out", "--max_steps", 2, "--save_strategy", "no", "--hold_share", 0.5)
    assert [name for name in load_file(tmp_path / "out" / "model.safetensors") if "pooler" in name] == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--task", "captioning"], "feature_distillation"),
        (["--mixup", "0.8"], r"\['mixup'\]"),
        (["--label_smoothing_factor", "0.1", "--distillation", "soft"], "label_smoothing_factor"),
        (["--class_names", "a", "b"], "class_names"),
        (["--num_removed_layers", "4"], "at least one must stay"),
        (["--output", "class_head"], "no class head"),
    ],
)
def test_wishes_that_cannot_be_met_stop_the_program_at_once(checkpoint, pictures, tmp_path, arguments, said):
    with pytest.raises(ValueError, match=said):
        run(checkpoint, pictures, tmp_path / "out", *arguments)
    assert not list((tmp_path / "out").glob("checkpoint-*"))


def test_without_a_checkpoint_there_are_no_features_to_keep(pictures, tmp_path):
    argv = [*OPTIONS, "--dataset_dir", str(pictures), "--output_dir", str(tmp_path / "out")]
    with pytest.raises(ValueError, match="--model_name_or_path"):
        run_training(*parse_arguments(argv, PROGRAM_ARGUMENTS))


def test_a_model_that_is_made_to_merge_is_compared_with_the_one_that_does_not(checkpoint, pictures, tmp_path):
    merged = run(checkpoint, pictures, tmp_path / "merged", "--token_merging_r", "2")
    plain = run(checkpoint, pictures, tmp_path / "plain")
    assert merged["before"]["macs"] == plain["before"]["macs"] and merged["after"]["macs"] < plain["after"]["macs"]
    assert merged["after"]["patch_cosine"] < plain["after"]["patch_cosine"] < 1
