"""The model a training starts from."""

import logging

import pytest
from transformers import DeiTImageProcessor, ViTConfig, ViTForImageClassification, ViTImageProcessor

from lambda_vit_hf.training.arguments import ModelArguments
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
    assert caplog.text == ""


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
