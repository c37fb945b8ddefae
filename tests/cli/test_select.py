"""`lambda-vit select`: what it prints and leaves behind, on one process and several."""

import json
import re
import shlex
from pathlib import Path

import PIL.Image
import pytest
import torch
from transformers import (
    AutoModelForImageClassification,
    Dinov2Config,
    Dinov2Model,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

from lambda_vit_hf import LambdaDinov2Model, LambdaViTForImageClassification
from lambda_vit_hf.cli import select, train
from lambda_vit_hf.evaluation.classifier import load_classifier_or_encoder
from lambda_vit_hf.models.mapped_attention import LinearMap
from lambda_vit_hf.selection.select import AttentionSelection
from lambda_vit_hf.training import tasks
from tests.conftest import in_two_processes, perturb


@pytest.fixture
def digits_vit(tmp_path):
    config = ViTConfig(
        image_size=8, patch_size=2, hidden_size=16, num_hidden_layers=4, num_attention_heads=2, num_labels=10
    )
    ViTForImageClassification(config).save_pretrained(tmp_path / "vit")
    ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(tmp_path / "vit")
    return str(tmp_path / "vit")


@pytest.mark.parametrize("strategy", ["nose", "last"])
def test_select_layers_prints_and_saves_the_selection(digits_vit, tmp_path, capsys, strategy):
    select.main(
        [digits_vit, "--dataset_name", "digits", "--num_removed_layers", "2", "--calibration_size", "30",
         "--strategy", strategy,
         "--pairs", "--autocast", "bfloat16", "--output_dir", str(tmp_path / "out")]
    )  # fmt: skip
    selection = AttentionSelection.load(tmp_path / "out" / "selection.json")
    assert (len(selection.layers), selection.num_images, selection.strategy) == (2, 30, strategy)
    assert selection.autocast_dtype == "bfloat16"
    printed = capsys.readouterr().out
    assert f"layers {selection.layers}" in printed
    layers = " ".join(map(str, selection.layers))
    command = f"lambda-vit train finetune --model_name_or_path {digits_vit} --dataset_name digits --removed_layers"
    assert f"to go on: {command} {layers} --fade_to {selection.mask}\n" in printed
    assert ("% of resamples" in printed) == (strategy == "nose")
    pictures = {"entropy.png", "pairs.png"} | ({"search.png"} if strategy == "nose" else set())
    assert {path.name for path in (tmp_path / "out").glob("*.png")} == pictures
    for name in pictures:
        PIL.Image.open(tmp_path / "out" / name).verify()


@pytest.mark.parametrize("in_place", [[], ["--linear_maps"]])
def test_an_encoder_without_head_is_measured_by_its_class_token_and_stays_an_encoder(tmp_path, capsys, in_place):
    config = Dinov2Config(hidden_size=16, num_hidden_layers=3, num_attention_heads=2, image_size=28, patch_size=14)
    Dinov2Model(config).save_pretrained(tmp_path / "dino")
    ViTImageProcessor(size={"height": 28, "width": 28}).save_pretrained(tmp_path / "dino")
    select.main([str(tmp_path / "dino"), "--dataset_name", "digits", "--removal_ratio", "0.34", *in_place,
                 "--calibration_size", "20", "--output_dir", str(tmp_path / "out")])  # fmt: skip
    selection = AttentionSelection.load(tmp_path / "out" / "selection.json")
    assert (len(selection.layers), selection.output, selection.num_images) == (1, "class_token", 20)
    if in_place:
        assert "it can be used as it is" in capsys.readouterr().out
        thinner = load_classifier_or_encoder(str(tmp_path / "out" / "model"))  # what `lambda-vit export` loads
        assert isinstance(thinner, LambdaDinov2Model) and thinner.config.removed_layers == selection.layers


def test_the_options_of_before_still_work(digits_vit):
    old = [digits_vit, "--dataset_name", "digits", "--num_layers", "2", "--num_images", "30"]
    with pytest.warns(FutureWarning, match="--num_layers is called --num_removed_layers now"):
        arguments = select.parse_arguments(old)
    assert (arguments.num_removed_layers, arguments.calibration_size) == (2, 30)
    with pytest.warns(FutureWarning, match="--ratio is called --removal_ratio now"):
        assert select.parse_arguments(["m", "--dataset_name", "digits", "--ratio", "0.4"]).removal_ratio == 0.4


def test_linear_maps_are_saved_in_a_model_that_can_be_used_and_trained(digits_vit, tmp_path, capsys, monkeypatch):
    output = tmp_path / "out"
    perturb(ViTForImageClassification.from_pretrained(digits_vit)).save_pretrained(digits_vit)
    select.main([digits_vit, "--dataset_name", "digits", "--num_removed_layers", "2", "--calibration_size", "40",
                 "--strategy", "last", "--linear_maps", "--output_dir", str(output)])  # fmt: skip
    thinner = AutoModelForImageClassification.from_pretrained(output / "model")
    assert (thinner.config.fade_to, thinner.config.removed_layers) == ("linear", [2, 3])
    printed = capsys.readouterr().out
    without, mapped = (float(value) for value in re.findall(r"before any training.*: KL \(nats\) ([\d.]+)", printed))
    assert mapped < without
    command = shlex.split(printed.split("to fine-tune it: lambda-vit train ")[1])
    teachers = []
    monkeypatch.setattr(tasks, "DistillationLoss", lambda teacher, **_: teachers.append(teacher))
    train.main([*command, "--max_steps", "2", "--max_train_samples", "32", "--max_eval_samples", "16",
                "--warmup_steps", "0", "--dataloader_num_workers", "0", "--use_cpu", "true",
                "--output_dir", str(tmp_path / "trained")])  # fmt: skip
    trained = AutoModelForImageClassification.from_pretrained(tmp_path / "trained")
    assert (trained.config.fade_to, trained.config.removed_layers) == ("linear", [2, 3])
    before, after = (model.vit.layers[3].mapped_attention.token_proj.weight for model in (thinner, trained))
    assert not torch.equal(before, after)
    assert not teachers, "it would be its own"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], ("nose", None)),
        (["--linear_maps"], ("divergence", "skip")),
        (["--linear_maps", "--strategy", "nose", "--mask", "identity"], ("nose", "identity")),
    ],
)
def test_maps_have_defaults_of_their_own(words, expected):
    arguments = select.parse_arguments(["m", "--dataset_name", "digits", "--num_removed_layers", "2", *words])
    assert (arguments.strategy, arguments.mask) == expected


def test_linear_maps_need_a_number_and_a_model_that_lost_nothing_in_another_way(digits_vit, tmp_path, capsys):
    with pytest.raises(SystemExit):
        select.main([digits_vit, "--dataset_name", "digits", "--linear_maps"])
    assert "--linear_maps needs a number of layers" in capsys.readouterr().err
    LambdaViTForImageClassification.from_pretrained(digits_vit, removed_layers=[1]).save_pretrained(digits_vit)
    with pytest.raises(ValueError, match="Remove all layers in one way"):
        select.main([digits_vit, "--dataset_name", "digits", "--linear_maps", "--num_removed_layers", "1"])


def test_a_model_with_linear_maps_goes_on_with_them_in_another_folder(digits_vit, tmp_path):
    model, out = LambdaViTForImageClassification.from_pretrained(digits_vit), tmp_path / "out"
    zeros = torch.zeros(16, 16)
    model.replace_attention({1: LinearMap(zeros, zeros, zeros[0])})
    model.save_pretrained(out / "model")
    ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(out / "model")
    command = [str(out / "model"), "--dataset_name", "digits", "--num_removed_layers", "1", "--calibration_size", "20"]
    with pytest.raises(ValueError, match="add --linear_maps"):
        select.main([*command, "--output_dir", str(tmp_path / "more")])
    with pytest.raises(ValueError, match="add --linear_maps"):
        select.main([*command[:3], "--max_kl", "1", "--output_dir", str(tmp_path / "more")])
    with pytest.raises(FileExistsError, match="model exists and is not an empty folder"):
        select.main([*command, "--linear_maps", "--output_dir", str(out)])
    select.main([*command, "--linear_maps", "--strategy", "last", "--output_dir", str(tmp_path / "more")])
    more = AutoModelForImageClassification.from_pretrained(tmp_path / "more" / "model")
    assert more.config.removed_layers == [1, 3]


def refuse_to_load_images(**_):
    raise AssertionError("images were loaded before")


@pytest.mark.parametrize(
    ("words", "error", "message"),
    [
        (["--num_removed_layers", "4"], ValueError, "at least one must stay"),
        (["--num_removed_layers", "0", "--linear_maps"], ValueError, "needs a layer to replace"),
        (["--max_kl", "-1"], ValueError, "--max_kl must be 0 or more"),
        (["--num_removed_layers", "1", "--output_dir", "{folder}/taken"], FileExistsError, "taken"),
        (["--num_removed_layers", "1", "--linear_maps", "--output_dir", "{folder}/old"], FileExistsError, "old/model"),
        (["--num_removed_layers", "1", "--linear_maps", "--output_dir", "{folder}/own"], FileExistsError, "own/model"),
    ],
)  # fmt: skip
def test_what_is_refused_is_refused_before_images_are_loaded(digits_vit, tmp_path, monkeypatch, words, error, message):
    (tmp_path / "old").mkdir()
    for file in ("taken", "old/model"):
        (tmp_path / file).write_text("mine")
    LambdaViTForImageClassification.from_pretrained(digits_vit).save_pretrained(tmp_path / "own" / "model")
    monkeypatch.setattr("lambda_vit_hf.data.folders.load_image_dataset", refuse_to_load_images)
    words = [word.format(folder=tmp_path) for word in words]
    with pytest.raises(error, match=message):
        select.main([digits_vit, "--dataset_name", "digits", *words])


def test_without_a_layer_to_remove_no_command_is_named_and_old_pictures_go(digits_vit, tmp_path, capsys):
    command = [digits_vit, "--dataset_name", "digits", "--calibration_size", "20", "--output_dir", str(tmp_path)]
    select.main([*command, "--num_removed_layers", "1", "--pairs"])
    assert (tmp_path / "search.png").exists() and (tmp_path / "pairs.png").exists()
    capsys.readouterr()
    select.main([*command, "--num_removed_layers", "0"])
    assert "to go on" not in capsys.readouterr().out
    assert not (tmp_path / "search.png").exists() and not (tmp_path / "pairs.png").exists()


def select_into(folder: str, model: str, rank: int) -> list[str]:
    output_dir = Path(folder) / str(rank)
    select.main(
        [model, "--dataset_name", "digits", "--num_removed_layers", "2", "--calibration_size", "20",
         "--batch_size", "7", "--output_dir", str(output_dir)]
    )  # fmt: skip
    return sorted(path.name for path in output_dir.glob("*"))


def test_of_several_processes_one_reports_what_all_selected(digits_vit, tmp_path):
    found = in_two_processes(select_into, str(tmp_path), digits_vit)
    assert found == [["entropy.png", "search.png", "selection.json"], []]
    shared = AttentionSelection.load(tmp_path / "0" / "selection.json")
    select_into(str(tmp_path), digits_vit, rank=2)
    alone = AttentionSelection.load(tmp_path / "2" / "selection.json")
    assert (shared.order, shared.num_images) == (alone.order, 20)


def how_many(model, folder, *more):
    select.main([model, "--dataset_name", "digits", "--calibration_size", "30", "--output_dir", str(folder), *more])


def test_without_a_number_it_says_how_many(digits_vit, tmp_path, capsys):
    how_many(digits_vit, tmp_path / "out")
    printed = capsys.readouterr().out
    assert [line.split("|")[1].strip() for line in printed.splitlines() if line.startswith("| ")][2:] == list("0123")
    assert "--num_removed_layers NUMBER" in printed
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"curve.json", "curve.png"}


def test_a_bound_picks_the_number_and_shows_what_others_would_take(digits_vit, tmp_path, capsys):
    how_many(digits_vit, tmp_path / "out", "--max_kl", "1000")
    printed = capsys.readouterr().out
    selection = AttentionSelection.load(tmp_path / "out" / "selection.json")
    assert len(selection.layers) == 3 and selection.strategy == "nose"
    assert "3 layers, by strategy" in printed and "| last | 1 2 3 |" in printed
    assert f"--removed_layers {' '.join(map(str, selection.layers))} --fade_to identity\n" in printed
    how_many(digits_vit, tmp_path / "none", "--max_divergence", "0")
    assert "not one layer can go" in capsys.readouterr().out
    assert not (tmp_path / "none" / "selection.json").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--max_kl", "0.1", "--num_removed_layers", "2"], "give no other"),
        (["--min_agreement", "0.9", "--removal_ratio", "0.5"], "give no other"),
        (["--pairs"], "--pairs needs a number"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options, message, capsys):
    with pytest.raises(SystemExit):
        select.parse_arguments(["m", "--dataset_name", "digits", *options])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("bound", [["--min_agreement", "1.5"], ["--max_kl", "-1"], ["--max_kl", "nan"]])
def test_a_bound_out_of_range_is_refused_before_anything_is_measured(digits_vit, tmp_path, bound):
    with pytest.raises(ValueError, match="must"):
        how_many(digits_vit, tmp_path / "out", *bound)
    assert not (tmp_path / "out").exists()


def test_a_folder_of_pictures_is_enough(digits_vit, tmp_path):
    for index in range(12):
        PIL.Image.new("RGB", (8, 8), (20 * index, 0, 0)).save(tmp_path / f"{index}.png")
    select.main([digits_vit, "--dataset_dir", str(tmp_path), "--num_removed_layers", "1",
                 "--output_dir", str(tmp_path / "out")])  # fmt: skip
    assert AttentionSelection.load(tmp_path / "out" / "selection.json").num_images == 9


@pytest.mark.parametrize(
    ("problem_type", "columns"),
    [("multi_label_classification", "KL (nats) | same labels (%)"), ("regression", "squared change / 2")],
)
def test_what_changes_is_named_by_what_the_head_says(digits_vit, tmp_path, monkeypatch, capsys, problem_type, columns):
    config = ViTConfig.from_pretrained(digits_vit)
    config.problem_type = problem_type
    config.save_pretrained(digits_vit)
    how_many(digits_vit, tmp_path / "out", "--max_divergence", "1000")
    printed = capsys.readouterr().out
    assert printed.count(f"| {columns} |") == 2, "in the curve, and beside other strategies"
    assert (
        "in a LambdaViTTrainer, with EntropyGuidedRemovalCallback(removed_layers=[1, 2, 3], fade_to='identity')"
        in printed
    )
    points = json.loads((tmp_path / "out" / "curve.json").read_text())["points"]
    assert all(point["divergence"] > 0 for point in points[1:])
    if problem_type == "regression":
        monkeypatch.setattr("lambda_vit_hf.data.folders.load_image_dataset", refuse_to_load_images)
        with pytest.raises(ValueError, match="--min_agreement needs a trained head of classes"):
            how_many(digits_vit, tmp_path / "out", "--min_agreement", "0.9")
