"""Options of a selection: checked at once, plain values inside, the same after a file."""

import dataclasses
import enum
import functools
import json

import numpy as np
import pytest
import torch

from lambda_vit_hf.selection.config import SelectionConfig


class Mask(enum.Enum):
    IDENTITY = "identity"


def test_the_defaults():
    assert SelectionConfig().to_dict() == {
        "strategy": "nose", "output": None, "mask": None, "compare": "magnitude", "calibration_size": 512,
        "seed": 0, "batch_size": 64, "autocast_dtype": None,
    }  # fmt: skip


@pytest.mark.parametrize(
    "wrong",
    [
        {"strategy": "best"},
        {"strategy": None},
        {"strategy": ["nose"]},
        {"output": "logits"},
        {"mask": "zero"},
        {"compare": "sign"},
        {"calibration_size": 0},
        {"calibration_size": 1.5},
        {"batch_size": 0},
        {"batch_size": True},
        {"batch_size": None},
        {"seed": -1},
        {"seed": "0"},
        {"autocast_dtype": "float32"},
        {"autocast_dtype": torch.float64},
    ],
    ids=str,
)
def test_a_wrong_value_is_refused_by_the_name_of_its_option(wrong):
    (name,) = wrong
    with pytest.raises(ValueError, match=f"`{name}` must be"):
        SelectionConfig(**wrong)


def test_values_of_other_libraries_become_plain_ones():
    config = SelectionConfig(
        strategy=np.str_("beam"), mask=Mask.IDENTITY, calibration_size=np.int64(100), seed=np.uint8(3),
        batch_size=np.int32(8), autocast_dtype=torch.bfloat16,
    )  # fmt: skip
    plain = SelectionConfig("beam", None, "identity", "magnitude", 100, 3, 8, "bfloat16")
    assert config == plain
    assert all(type(value) in (str, int, type(None)) for value in config.to_dict().values())
    assert SelectionConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == plain


def test_it_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        SelectionConfig().mask = "identity"


def my_strategy(search):
    return search.candidates[: search.num_layers]


def test_of_a_function_the_name_is_written():
    config = SelectionConfig(strategy=my_strategy)
    assert config.strategy is my_strategy
    assert config.strategy_name == config.to_dict()["strategy"] == "my_strategy"
    assert SelectionConfig(strategy=functools.partial(my_strategy)).strategy_name == "partial"


def test_an_unknown_option_in_a_file_is_refused():
    with pytest.raises(ValueError, match="masks"):
        SelectionConfig.from_dict({"masks": "skip"})
