"""The model a training starts from."""

import logging

import pytest
import torch
from transformers import DeiTImageProcessor, ViTConfig, ViTForImageClassification, ViTImageProcessor, ViTModel

from lambda_vit_hf import LambdaDINOv3ViTConfig, LambdaDINOv3ViTForImageClassification, LambdaViTForImageClassification
from lambda_vit_hf.training.arguments import PROGRAM_ARGUMENTS, ModelArguments, parse_arguments
from lambda_vit_hf.training.output_folder import OutputFolder
from lambda_vit_hf.training.starting_model import load_starting_model
from tests.conftest import TINY


NAMES = ["ant", "bee", "cat", "dog", "eel"]


@pytest.fixture
def named(tmp_path):
    """A ViT with class names, and an image processor that crops."""
    shape = {name: value for name, value in TINY.items() if name != "num_labels"}
    config = ViTConfig(
        **shape, id2label=dict(enumerate(NAMES)), label2id={name: index for index, name in enumerate(NAMES)}
    )
    ViTForImageClassification(config).save_pretrained(tmp_path / "vit")
    DeiTImageProcessor(size={"shortest_edge": 20}, crop_size={"height": 16, "width": 16}).save_pretrained(
        tmp_path / "vit"
    )
    return tmp_path / "vit"


def load(source, names, tmp_path, crop=None, **options):
    arguments = ModelArguments(model_name_or_path=source and str(source), **options)
    return load_starting_model(arguments, names, OutputFolder(tmp_path / "out"), False, crop)


def test_the_same_classes_need_no_new_classifier(named, tmp_path, caplog):
    model, _, is_new = load(named, NAMES, tmp_path)
    assert not is_new
    assert model.config.id2label == dict(enumerate(NAMES))
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING] == []


def test_the_same_classes_in_another_order_are_refused(named, tmp_path):
    with pytest.raises(ValueError, match="another order"):
        load(named, NAMES[::-1], tmp_path)


def test_other_names_are_taken_with_a_warning(named, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        model, _, is_new = load(named, [*NAMES[:4], "fox"], tmp_path)
    assert not is_new
    assert model.config.id2label[4] == "fox"
    assert "names 1 of its classes otherwise" in caplog.text


def test_another_image_size_keeps_the_share_that_is_cropped(named, tmp_path):
    model, processor, _ = load(named, NAMES, tmp_path, image_size=32)
    assert model.config.image_size == 32
    assert processor.crop_size.height == 32 and processor.size.shortest_edge == 40


def test_a_new_model_evaluates_the_crop_that_is_asked_for(tmp_path):
    shape = dict(image_size=28, patch_size=7, hidden_size=16, num_hidden_layers=2, num_attention_heads=2)
    _, processor, is_new = load(None, NAMES, tmp_path, crop=0.875, **shape)
    assert is_new
    assert isinstance(processor, ViTImageProcessor)
    assert (processor.size.shortest_edge, processor.crop_size.height) == (32, 28)


# A classifier that was not in the checkpoint is new, whatever the config says of its classes.


@pytest.fixture
def headless(tmp_path):
    """A ViT without a classifier; its config says 2 classes, transformers' default."""
    shape = {name: value for name, value in TINY.items() if name != "num_labels"}
    ViTModel(ViTConfig(**shape)).save_pretrained(tmp_path / "backbone")
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(tmp_path / "backbone")
    return tmp_path / "backbone"


@pytest.mark.parametrize("names", [["cat", "dog"], NAMES], ids=len)
def test_a_checkpoint_without_a_classifier_gets_a_new_one_that_is_trained_first(headless, tmp_path, names, caplog):
    model, _, is_new = load(headless, names, tmp_path)
    assert is_new
    assert model.config.id2label == dict(enumerate(names))
    assert "no classifier: a new one is trained first" in caplog.text


def test_a_classifier_that_was_saved_before_any_training_is_trained_first(named, tmp_path):
    model, _, _ = load(named, ["ant", "bee"], tmp_path, ignore_mismatched_sizes=True)
    model.save_pretrained(tmp_path / "untrained")
    DeiTImageProcessor.from_pretrained(named).save_pretrained(tmp_path / "untrained")
    _, _, is_new = load(tmp_path / "untrained", ["ant", "bee"], tmp_path)
    assert is_new


def test_another_number_of_classes_needs_a_word(named, tmp_path):
    with pytest.raises(ValueError, match=r"5 classes, the dataset has 2.*--ignore_mismatched_sizes"):
        load(named, ["cat", "dog"], tmp_path)
    model, _, is_new = load(named, ["cat", "dog"], tmp_path, ignore_mismatched_sizes=True)
    assert is_new and model.config.num_labels == 2


@pytest.mark.parametrize("problem_type", ["multi_label_classification", "regression"])
def test_a_classifier_for_something_else_is_refused_and_a_new_one_is_for_one_class(named, tmp_path, problem_type):
    config = ViTConfig.from_pretrained(named)
    config.problem_type = problem_type
    config.save_pretrained(named)
    with pytest.raises(ValueError, match=f"was trained for {problem_type.replace('_', ' ')}"):
        load(named, NAMES, tmp_path)
    model, _, is_new = load(named, NAMES[:2], tmp_path, ignore_mismatched_sizes=True)
    assert is_new and model.config.problem_type == "single_label_classification"


@pytest.mark.parametrize("is_new", [False, True])
def test_token_merging_is_on_from_the_start_and_saved(named, tmp_path, is_new):
    arguments = ["--output_dir", str(tmp_path / "out"), "--token_merging_r", "2", "--token_merging_start", "1"]
    source = ["digits"] if is_new else ["--model_name_or_path", str(named), "--dataset_dir", str(tmp_path)]
    parsed = parse_arguments([*source, "--num_removed_layers", "2", *arguments], PROGRAM_ARGUMENTS)
    model, *_ = load_starting_model(parsed[0], NAMES, OutputFolder(tmp_path / "out"), False)
    model.save_pretrained(tmp_path / "saved")
    config = LambdaViTForImageClassification.from_pretrained(tmp_path / "saved").config
    assert (config.token_merging_r, config.token_merging_start) == (2, 1)
    side = config.image_size
    features = model(torch.zeros(1, 3, side, side), output_hidden_states=True).hidden_states
    tokens = features[0].shape[1]
    assert [one.shape[1] for one in features[1:4]] == [tokens, tokens - 2, tokens - 4]


def test_token_merging_of_a_family_that_cannot_is_refused(tmp_path):
    shape = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=32)
    LambdaDINOv3ViTForImageClassification(LambdaDINOv3ViTConfig(**shape, num_labels=5)).save_pretrained(
        tmp_path / "dinov3"
    )
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "dinov3")
    with pytest.raises(ValueError, match=r"LambdaDINOv3ViTModel cannot merge tokens: .*rotary positions"):
        load(tmp_path / "dinov3", NAMES, tmp_path, token_merging_r=2)


def test_a_shape_that_is_not_the_checkpoints_is_refused(named, tmp_path):
    with pytest.raises(ValueError, match=r"'patch_size': \(4, 2\).*Leave these out"):
        load(named, NAMES, tmp_path, patch_size=2, hidden_size=TINY["hidden_size"])
    load(named, NAMES, tmp_path, patch_size=TINY["patch_size"], hidden_size=TINY["hidden_size"])


def test_a_recipes_shape_is_not_put_on_a_checkpoint_of_the_command_line(named, tmp_path, caplog):
    parsed = parse_arguments(["digits", "--model_name_or_path", str(named)], PROGRAM_ARGUMENTS)
    model, *_ = load_starting_model(parsed[0], NAMES, OutputFolder(tmp_path / "out"), False)
    assert (model.config.image_size, model.config.patch_size) == (TINY["image_size"], TINY["patch_size"])
    assert "left out" in caplog.text.lower() and "image_size" in caplog.text
    resized = parse_arguments(["digits", "--model_name_or_path", str(named), "--image_size", "32"], PROGRAM_ARGUMENTS)
    model, *_ = load_starting_model(resized[0], NAMES, OutputFolder(tmp_path / "out"), False)
    assert model.config.image_size == 32


@pytest.mark.parametrize(
    ("names", "options", "said"),
    [
        (NAMES, {}, "attention in 6 of 6 layers; images of 16 x 16 pixels; the checkpoint's classifier of 5 classes"),
        (NAMES[:3], {"ignore_mismatched_sizes": True, "image_size": 32},
         "images of 32 x 32 pixels; a new classifier of 3 classes"),
    ],
)  # fmt: skip
def test_what_was_understood_is_said_before_training(named, tmp_path, caplog, names, options, said):
    with caplog.at_level(logging.INFO, "lambda_vit_hf"):
        load(named, names, tmp_path, **options)
    assert f"Model: LambdaViTForImageClassification of {named}; " in caplog.text
    assert said in caplog.text
