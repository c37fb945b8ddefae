"""What cannot be selected is refused at once, with what to do."""

import json
import logging
from fractions import Fraction

import numpy as np
import peft
import pytest
import torch

from lambda_vit_hf import LambdaViTForImageClassification, select_attention_layers
from lambda_vit_hf.selection.checks import check_amount, count_layers


@pytest.mark.parametrize(("ratio", "expected"), [(0.4, 5), (0.5, 6), (0.25, 3), (0.3, 4), (0.0, 0)])
def test_ratios_count_layers_as_the_paper_does(ratio, expected):
    assert count_layers(12, None, ratio) == expected


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"num_removed_layers": 1, "removal_ratio": 0.5},
        {"removal_ratio": 1.5},
        {"removal_ratio": -0.1},
        {"removal_ratio": float("nan")},
        {"removal_ratio": "half"},
        {"removal_ratio": 1.0},
        {"num_removed_layers": 6},
        {"num_removed_layers": -1},
        {"num_removed_layers": 1.5},
        {"num_removed_layers": 1, "strategy": "best"},
        {"num_removed_layers": 1, "output": "logits"},
        {"num_removed_layers": 1, "mask": "zero"},
        {"num_removed_layers": 1, "compare": "sign"},
    ],
    ids=str,
)
def test_impossible_requests_are_refused(model, images, arguments):
    with pytest.raises(ValueError):
        select_attention_layers(model, images, **arguments)


# peft asks transformers by a name that will go.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")


def peft_model(model):
    config = peft.LoraConfig(target_modules=["q_proj"])
    return peft.get_peft_model(model, config)


class Wrapper(torch.nn.Module):
    """As `DistributedDataParallel` wraps a model."""

    def __init__(self, model):
        super().__init__()
        self.module = model


@pytest.mark.parametrize(
    ("wrap", "hint"),
    [
        (peft_model, r"PeftModel.*merge_and_unload.*get_base_model"),
        (Wrapper, r"got Wrapper: pass `model.module`"),
        (torch.compile, r"got OptimizedModule: pass `model._orig_mod`"),
        (lambda model: torch.nn.Linear(1, 1), "load it with a class such as LambdaViT"),
        (lambda model: "a/model", "got str: load it with a class such as LambdaViT"),
    ],
    ids=["peft", "wrapper", "compiled", "other", "name"],
)
def test_another_model_is_refused_with_what_to_do(model, images, wrap, hint):
    with pytest.raises(ValueError, match=hint):
        select_attention_layers(wrap(model), images, num_removed_layers=1)


def test_the_base_model_of_adapters_can_be_selected_on(model, images):
    expected = select_attention_layers(model, images, num_removed_layers=2)
    wrapped = peft_model(model)  # adapters start at zero
    assert select_attention_layers(wrapped.get_base_model(), images, num_removed_layers=2).order == expected.order


def test_a_new_head_is_not_what_layers_are_selected_by(model, images, tmp_path, caplog):
    model.base_model.save_pretrained(tmp_path)
    model = LambdaViTForImageClassification.from_pretrained(tmp_path, num_labels=5)
    with pytest.raises(ValueError, match=r"newly initialized.*Train it first.*class_token"):
        select_attention_layers(model, images, num_removed_layers=2, output="class_head")
    with caplog.at_level(logging.WARNING):
        selection = select_attention_layers(model, images, num_removed_layers=2)
    assert "newly initialized" in caplog.text and "class token" in caplog.text
    assert selection.output == "class_token"
    assert selection == select_attention_layers(model, images, num_removed_layers=2, output="class_token")
    caplog.clear()
    with torch.no_grad():
        model.classifier.weight.mul_(2)  # as if trained
    assert select_attention_layers(model, images, num_removed_layers=2).output == "class_head"
    assert "newly initialized" not in caplog.text


@pytest.mark.parametrize("ratio", [np.float32(0.34), np.float64(0.34), Fraction(1, 3)])
def test_a_ratio_can_be_any_real_number(model, images, ratio):
    assert len(select_attention_layers(model, images, removal_ratio=ratio, strategy="first").layers) == 2


def test_a_number_of_layers_can_be_numpys(model, images):
    selection = select_attention_layers(model, images, num_removed_layers=np.int64(2), strategy="first")
    assert json.loads(json.dumps(selection.to_dict()))["layers"] == selection.removed_layers == [0, 1]


def test_a_ratio_that_rounds_to_no_layer_is_refused_and_zero_is_not():
    with pytest.raises(ValueError, match=r"`removal_ratio` 0.05 of 6 attention layers rounds to 0"):
        count_layers(6, None, 0.05)
    assert count_layers(6, None, 0.0) == count_layers(6, 0, None) == 0


@pytest.mark.parametrize("wrong", [1.5, -0.1, float("nan"), True, "0.5", np.bool_(True)])
def test_a_wrong_ratio_is_refused_without_a_model(wrong):
    with pytest.raises(ValueError, match="`removal_ratio` must be a fraction"):
        check_amount(None, wrong)
