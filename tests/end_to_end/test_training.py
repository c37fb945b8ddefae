"""The training program, as a user runs it: the same program, a smaller model and fewer epochs."""

import json
import os
import runpy
import shutil
import signal
import sys
from pathlib import Path

import datasets
import PIL.Image
import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForImageClassification,
    Trainer,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
    pipeline,
)

from lambda_vit_hf.selection.select import AttentionSelection
from lambda_vit_hf.training import reporting
from lambda_vit_hf.training.arguments import PROGRAM_ARGUMENTS, parse_arguments
from lambda_vit_hf.training.run import run_training
from tests.conftest import in_a_new_process, in_two_processes


ROOT = Path(__file__).parents[2]
RECIPE = "trainer_scripts/recipes/digits.yaml"
SHAPE = "--hidden_size 16 --num_hidden_layers 4 --num_attention_heads 2 --intermediate_size 32".split()
SMALL = """
--base_num_train_epochs 1 --num_train_epochs 2 --per_device_train_batch_size 128 --calibration_size 64 --random_shift 1
--drop_path_rate 0.1 --eval_strategy no --save_strategy steps --save_steps 4 --save_total_limit 20 --warmup_steps 2
--logging_steps 4 --use_cpu true
""".split()


FEWER_IMAGES = "--max_train_samples 360 --per_device_train_batch_size 32".split()  # as many steps


def run(output_dir, *arguments) -> dict:
    fewer = [] if {"--streaming", "--per_device_train_batch_size"} & set(map(str, arguments)) else FEWER_IMAGES
    argv = [str(ROOT / RECIPE), "--output_dir", str(output_dir), *SMALL, *fewer, *map(str, arguments)]
    if "--model_name_or_path" not in argv:  # else the checkpoint has its shape
        argv += SHAPE
    if not {"--num_removed_layers", "--removed_layers", "--removal_ratio"} & set(argv):
        argv += ["--num_removed_layers", "2"]
    return run_training(*parse_arguments(argv, PROGRAM_ARGUMENTS))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One uninterrupted run: output folder and metrics."""
    folder = tmp_path_factory.mktemp("finished") / "digits"
    return folder, run(folder)


def test_everything_a_user_needs_is_in_the_output_folder(finished):
    folder, metrics = finished
    assert json.loads((folder / "metrics.json").read_text()) == metrics
    selection = AttentionSelection.load(folder / "selection.json")
    assert selection.layers == metrics["layers"]
    assert len(selection.steps) == 2
    for picture in ("entropy.png", "training.png"):
        PIL.Image.open(folder / picture).verify()
    card = (folder / "README.md").read_text()
    assert f"{metrics['after']['parameters']:,}" in card
    assert f"{100 * metrics['after']['top1']:.2f} %" in card
    assert {"config.json", "model.safetensors", "preprocessor_config.json"} <= {path.name for path in folder.iterdir()}


def test_the_saved_model_is_the_removed_one_that_was_evaluated(finished):
    folder, metrics = finished
    model = AutoModelForImageClassification.from_pretrained(folder)
    assert model.config.removed_layers == metrics["layers"]
    assert model.config.fold_removed
    assert sum(p.numel() for p in model.parameters()) == metrics["after"]["parameters"]
    assert metrics["after"]["parameters"] < metrics["before"]["parameters"]
    assert metrics["after"]["file_bytes"] == (folder / "model.safetensors").stat().st_size
    validation = datasets_digits()["validation"]
    processor = ViTImageProcessor.from_pretrained(folder)
    pixel_values = processor([image.convert("RGB") for image in validation["image"]], return_tensors="pt")
    with torch.no_grad():
        predicted = model(**pixel_values).logits.argmax(-1)
    assert (predicted == torch.tensor(validation["label"])).float().mean().item() == pytest.approx(
        metrics["after"]["top1"]
    )


def datasets_digits():
    from lambda_vit_hf.data.folders import load_digits

    return load_digits()


def test_the_output_folder_works_in_a_pipeline_with_class_names(finished):
    answer = pipeline("image-classification", model=str(finished[0]))(datasets_digits()["validation"][0]["image"])
    assert {entry["label"] for entry in answer} <= set("0123456789")


def run_until_killed_while_saving(folder, where):
    save = Trainer._save_optimizer_and_scheduler

    def die(trainer, output_dir):
        if output_dir.endswith(where):
            os.kill(os.getpid(), signal.SIGKILL)
        save(trainer, output_dir)

    Trainer._save_optimizer_and_scheduler = die
    run(folder)


@pytest.mark.parametrize("where", ["digits/checkpoint-12", "digits/base-training/checkpoint-8"])
def test_a_run_killed_while_saving_resumes_and_ends_in_the_same_weights(finished, tmp_path, caplog, where):
    expected = load_file(finished[0] / "model.safetensors")
    folder = tmp_path / "digits"
    assert in_a_new_process(run_until_killed_while_saving, folder, where) == -signal.SIGKILL
    assert (tmp_path / where / "model.safetensors").is_file(), "the kill should leave half a checkpoint"
    run(folder, "--resume_from_checkpoint", "true")
    assert "Passing over" in caplog.text
    assert Path(where).name in caplog.text
    resumed = load_file(folder / "model.safetensors")
    assert resumed.keys() == expected.keys()
    for name, value in resumed.items():
        assert torch.equal(value, expected[name]), f"{name} differs from the uninterrupted run's"
    assert not (folder / "base-training").exists()


def start_script(argv: list[str], rank: int) -> None:
    sys.argv = ["train.py", *argv]
    runpy.run_path(str(ROOT / "trainer_scripts" / "train.py"), run_name="__main__")


def test_two_processes_give_the_same_layers_and_nearly_the_same_weights(finished, tmp_path, caplog):
    folder = tmp_path / "digits"
    # Less than an epoch: a last batch that is not full is filled up differently by two processes.
    same = ["--drop_path_rate", "0", "--base_num_train_epochs", "0.9", "--num_train_epochs", "0.9",
            "--per_device_train_batch_size", "128"]  # fmt: skip
    # Half the batch in each process: the same images in each step. (test_recipes.py starts `accelerate launch`.)
    argv = [str(ROOT / RECIPE), "--output_dir", str(folder), *SMALL, *SHAPE, "--num_removed_layers", "2", *same,
            "--per_device_train_batch_size", "64"]  # fmt: skip
    in_two_processes(start_script, argv)
    one = run(tmp_path / "one", *same)
    two = json.loads((folder / "metrics.json").read_text())
    assert two["layers"] == one["layers"]
    selections = [AttentionSelection.load(path / "selection.json") for path in (folder, tmp_path / "one")]
    assert selections[0].output_entropy == pytest.approx(selections[1].output_entropy, rel=1e-3)
    weights = [load_file(path / "model.safetensors") for path in (folder, tmp_path / "one")]
    # Gradients are summed in another order, and Adam turns tiny gradients of either sign into whole steps.
    difference = sum((value - weights[1][name]).square().sum() for name, value in weights[0].items()).sqrt()
    size = sum(value.square().sum() for value in weights[1].values()).sqrt()
    assert difference < 0.01 * size
    assert abs(two["after"]["top1"] - one["after"]["top1"]) <= 0.02
    # Lambda is 0 from step 7 of 11 on: neither weight decay nor momentum may move attention that is off.
    before, after = (load_file(folder / f"checkpoint-{step}" / "model.safetensors") for step in (8, 11))
    off = [name for name in before for layer in two["layers"] if f"layers.{layer}.attention." in name]
    assert len(off) == 2 * 8
    assert [name for name in off if not torch.equal(before[name], after[name])] == []
    # One process goes on where two were.
    resumed = run(tmp_path / "resumed", *same, "--resume_from_checkpoint", folder / "checkpoint-8")
    assert "written by 2 processes, this run has 1" in caplog.text
    assert resumed["layers"] == two["layers"]
    with pytest.raises(ValueError, match="lambda would jump"):
        run(tmp_path / "other", *same, "--resume_from_checkpoint", folder / "checkpoint-8",
            "--per_device_train_batch_size", "64")  # fmt: skip


def test_the_program_trains_from_a_checkpoint_and_a_folder_of_images(tmp_path):
    digits = datasets_digits()
    for split, count in (("train", 160), ("validation", 40)):
        for index, row in enumerate(digits[split].select(range(count))):
            folder = tmp_path / "images" / split / f"digit {row['label']}"
            folder.mkdir(parents=True, exist_ok=True)
            row["image"].save(folder / f"{index}.png")
    names = {index: f"digit {index}" for index in range(10)}
    config = ViTConfig(
        image_size=8, patch_size=2, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32,
        id2label=names, label2id={name: index for index, name in names.items()},
    )  # fmt: skip
    ViTForImageClassification(config).save_pretrained(tmp_path / "vit")
    ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(tmp_path / "vit")
    metrics = run(
        tmp_path / "out", "--model_name_or_path", tmp_path / "vit", "--dataset_dir", tmp_path / "images",
        "--num_removed_layers", 1, "--per_device_train_batch_size", 40,
    )  # fmt: skip
    assert len(metrics["layers"]) == 1
    restored = AutoModelForImageClassification.from_pretrained(tmp_path / "out")
    assert restored.config.id2label[3] == "digit 3"
    assert not (tmp_path / "out" / "base").exists()


@pytest.mark.parametrize("recipe", ["finetune", "digits"])
def test_pictures_of_ones_own_and_a_checkpoint_of_224_px_need_no_word_about_shape(tmp_path, recipe, monkeypatch):
    monkeypatch.setattr(reporting, "BATCH_SIZE", 4)  # of the speeds in the report: 64 large images 36 times over
    digits = datasets_digits()
    for split, count in (("train", 32), ("validation", 8)):
        for index, row in enumerate(digits[split].select(range(count))):
            path = tmp_path / "images" / split / ("even" if row["label"] % 2 == 0 else "odd") / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            row["image"].save(path)
    config = ViTConfig(hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32, num_labels=9)
    ViTForImageClassification(config).save_pretrained(tmp_path / "vit")
    ViTImageProcessor().save_pretrained(tmp_path / "vit")
    command = [
        recipe, "--model_name_or_path", tmp_path / "vit", "--ignore_mismatched_sizes", "--dataset_dir",
        tmp_path / "images", "--removal_ratio", 0.4, "--output_dir", tmp_path / "out", "--num_train_epochs", 1,
        "--base_num_train_epochs", 1, "--per_device_train_batch_size", 8, "--dataloader_num_workers", 0,
        "--warmup_steps", 0, "--use_cpu", "true",
    ]  # fmt: skip
    run_training(*parse_arguments(list(map(str, command)), PROGRAM_ARGUMENTS))
    restored = AutoModelForImageClassification.from_pretrained(tmp_path / "out")
    assert (restored.config.image_size, restored.config.patch_size, restored.config.hidden_size) == (224, 16, 16)
    assert restored.config.id2label == {0: "even", 1: "odd"}
    assert len(restored.config.removed_layers) == 1


# Bad input: a clear error before training starts.


def test_a_folder_with_something_in_it_is_not_touched_without_a_word(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="--overwrite_output_dir"):
        run(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_an_output_folder_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError, match="is a file"):
        run(tmp_path / "file")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--removal_ratio", "1.5"], r"\[0, 1\]"),
        (["--removed_layers", "0", "4"], "out of range"),
        (["--removed_layers", "1", "1"], "more than once"),
        (["--dataset_dir", "nowhere"], "nowhere does not exist"),
        (["--distillation", "soft", "--distillation_alpha", "1.5"], "alpha"),
        (["--distillation", "some"], "kind"),
        (["--warmup_epochs", "1"], "min_learning_rate"),
        (["--min_learning_rate", "1e-5"], "warmup_steps"),
        (["--min_learning_rate", "1", "--warmup_steps", "0"], "floor"),
        (["--min_learning_rate", "1e-5", "--warmup_steps", "0", "--warmup_epochs", "5"], "warmup_steps"),
        (["--ema_decay", "0.99996"], "looks back over 25,000 steps"),
        (["--save_only_model", "true"], "resumed"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_wishes_that_cannot_be_met_stop_the_program_before_training(tmp_path, arguments, said):
    with pytest.raises((ValueError, FileNotFoundError), match=said):
        run(tmp_path / "out", *arguments)
    assert not (tmp_path / "out" / "base").exists(), "the base model was trained before the error"


def test_a_file_that_is_no_image_is_named(tmp_path):
    for index in range(12):
        path = tmp_path / "images" / ("cat" if index % 2 else "dog") / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        PIL.Image.new("L", (8, 8)).save(path)
    (path.parent / "broken.png").write_text("not an image")
    with pytest.raises(ValueError, match=r"broken\.png"):
        run(tmp_path / "out", "--dataset_dir", tmp_path / "images", "--unreadable_images", "raise")


def test_another_number_of_classes_than_the_checkpoints_is_an_error(tmp_path):
    config = ViTConfig(
        image_size=8, patch_size=2, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, num_labels=7
    )
    ViTForImageClassification(config).save_pretrained(tmp_path / "vit")
    ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(tmp_path / "vit")
    with pytest.raises(ValueError, match="7 classes, the dataset has 10"):
        run(tmp_path / "out", "--model_name_or_path", tmp_path / "vit", "--num_removed_layers", 1)


def test_overwriting_deletes_nothing_before_all_input_is_checked(finished, tmp_path):
    folder = tmp_path / "digits"
    shutil.copytree(finished[0], folder)
    before = sorted(path.name for path in folder.iterdir())
    wrong = [["--dataset_dir", "nowhere"], ["--model_name_or_path", folder / "base"], ["--hold_share", 2],
             ["--max_steps", 1]]  # fmt: skip
    for arguments in wrong:
        with pytest.raises((ValueError, FileNotFoundError)):
            run(folder, "--overwrite_output_dir", *arguments)
        assert sorted(path.name for path in folder.iterdir()) == before, arguments


def test_a_new_classifier_is_trained_before_layers_are_chosen(tmp_path):
    config = ViTConfig(
        image_size=8, patch_size=2, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32,
        num_labels=7,
    )  # fmt: skip
    ViTForImageClassification(config).save_pretrained(tmp_path / "vit")
    ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(tmp_path / "vit")
    run(
        tmp_path / "out", "--model_name_or_path", tmp_path / "vit", "--ignore_mismatched_sizes",
        "--num_removed_layers", 1, "--image_size", 16,
        "--base_num_train_epochs", 0.2, "--num_train_epochs", 0.4, "--save_strategy", "no",
    )  # fmt: skip
    assert (tmp_path / "out" / "base" / "model.safetensors").is_file()
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "out")
    assert (model.config.num_labels, model.config.image_size) == (10, 16)
    assert ViTImageProcessor.from_pretrained(tmp_path / "out").size == {"height": 16, "width": 16}


def test_resuming_into_another_folder_finds_the_base_beside_the_checkpoint(finished, tmp_path):
    expected = load_file(finished[0] / "model.safetensors")
    checkpoint = finished[0] / "checkpoint-20"
    run(tmp_path / "elsewhere", "--resume_from_checkpoint", checkpoint,
        "--restore_callback_states_from_checkpoint", "true")  # fmt: skip
    resumed = load_file(tmp_path / "elsewhere" / "model.safetensors")
    assert all(torch.equal(value, expected[name]) for name, value in resumed.items())
    PIL.Image.open(tmp_path / "elsewhere" / "entropy.png").verify()


def test_before_is_the_model_as_it_was_given_whether_resumed_or_not(finished, tmp_path):
    merging = ["--token_merging_r", "2", "--distillation", "soft", "--distillation_hidden_weight", "0"]
    whole = run(tmp_path / "new", *merging)
    resumed = run(tmp_path / "new", *merging, "--resume_from_checkpoint", tmp_path / "new" / "checkpoint-20")
    for figures in (whole, resumed):
        figures["before"].pop("images_per_second")
    assert resumed["before"] == whole["before"], "the base was trained merging"
    assert whole["before"]["macs"] < finished[1]["before"]["macs"]
    given = run(tmp_path / "given", "--model_name_or_path", finished[0] / "base", *merging)
    for name in ("macs", "top1"):
        assert given["before"][name] == finished[1]["before"][name]


def test_an_average_may_look_back_where_nothing_is_removed(finished, tmp_path):
    long = ["--model_name_or_path", finished[0] / "base", "--ema_decay", "0.99", "--max_steps", "4"]
    with pytest.raises(ValueError, match="looks back over 100 steps"):
        run(tmp_path / "removed", *long)
    assert run(tmp_path / "whole", *long, "--num_removed_layers", "0")["layers"] == []


def test_a_checkpoint_without_an_image_processor_is_named(tmp_path):
    config = ViTConfig(image_size=8, patch_size=2, hidden_size=16, num_hidden_layers=3, num_attention_heads=2,
                       num_labels=10)  # fmt: skip
    ViTForImageClassification(config).save_pretrained(tmp_path / "vit")
    with pytest.raises(OSError, match=r"preprocessor_config\.json"):
        run(tmp_path / "out", "--model_name_or_path", tmp_path / "vit", "--num_removed_layers", 1)


def test_resuming_from_a_broken_checkpoint_is_refused(tmp_path):
    with pytest.raises(ValueError, match="Cannot resume"):
        run(tmp_path / "out", "--resume_from_checkpoint", tmp_path)


def test_parquet_files_are_read(tmp_path):
    digits = datasets_digits()
    digits["train"].select(range(100)).to_parquet(tmp_path / "train-0.parquet")
    digits["validation"].select(range(50)).to_parquet(tmp_path / "validation-0.parquet")
    from lambda_vit_hf.data.folders import load_image_dataset

    loaded = load_image_dataset(directory=tmp_path)
    assert (len(loaded["train"]), len(loaded["validation"])) == (100, 50)
    assert isinstance(loaded["train"].features["label"], datasets.ClassLabel)
