import json

import pytest
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, ViTConfig

from lambda_vit_hf import LambdaViTConfig


def test_all_attention_is_kept_by_default():
    assert LambdaViTConfig(num_hidden_layers=3).attention_flags == [True] * 3


def test_kept_and_removed_layers_follow_the_flags():
    config = LambdaViTConfig(num_hidden_layers=4, attention_flags=[True, False, True, False])
    assert (config.kept_layers, config.removed_layers) == ([0, 2], [1, 3])


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"attention_flags": "abc"}, "attention_flags"),
        ({"attention_flags": [1, 0]}, "attention_flags"),
        ({"attention_flags": [True, None]}, "attention_flags"),
        ({"attention_flags": [True] * 3}, "expected 2"),
        ({"attention_flags": []}, "expected 2"),
        ({"attention_flags": [False, False]}, "Keep at least one"),
        ({"fold_removed": "yes"}, "fold_removed"),
        ({"drop_path_rate": 1.0}, "drop_path_rate"),
        ({"drop_path_rate": -0.1}, "drop_path_rate"),
        ({"drop_path_rate": float("nan")}, "drop_path_rate"),
        ({"drop_path_schedule": "steep"}, "drop_path_schedule"),
        ({"hidden_size": 30, "num_attention_heads": 4}, "num_attention_heads"),
        ({"hidden_size": -1}, "hidden_size"),
        ({"fold_exponent": 2}, "fold_removed"),
        ({"token_merging_r": -1}, "0 or more"),
        ({"token_merging_r": 1.5}, "token_merging_r"),
        ({"token_merging_r": [1]}, "expected 2"),
        ({"token_merging_r": [1, 1], "token_merging_start": 1}, "a list says itself"),
        ({"token_merging_r": 1, "token_merging_start": 2}, "must be below 2"),
    ],
)
def test_what_cannot_be_is_refused_and_named(arguments, named):
    with pytest.raises(StrictDataclassError, match=named):
        LambdaViTConfig(num_hidden_layers=2, **arguments)


def test_flags_of_another_length_are_refused_on_loading(tmp_path):
    LambdaViTConfig(num_hidden_layers=2).save_pretrained(tmp_path)
    with pytest.raises(StrictDataclassError, match="expected 2"):
        LambdaViTConfig.from_pretrained(tmp_path, attention_flags=[True] * 3)


def test_a_config_file_rebuilds_the_config(tmp_path):
    config = LambdaViTConfig(
        num_hidden_layers=3, attention_flags=[False, True, True], fold_removed=True, drop_path_rate=0.1,
        drop_path_schedule="linear", token_merging_r=[1, 0, 2], fold_exponent=1,
        id2label={0: "yes: no", 1: "ünï", 2: ""},
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    restored = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(restored, LambdaViTConfig)
    assert restored.to_diff_dict() | {"_name_or_path": ""} == config.to_diff_dict() | {"_name_or_path": ""}


def test_drop_path_is_constant_or_grows_to_its_rate_in_the_last_layer():
    assert LambdaViTConfig(num_hidden_layers=3, drop_path_rate=0.2).drop_path_rates() == [0.2] * 3
    growing = LambdaViTConfig(num_hidden_layers=3, drop_path_rate=0.2, drop_path_schedule="linear")
    assert growing.drop_path_rates() == [0.0, 0.1, 0.2]


def test_tokens_merge_in_blocks_that_keep_attention_from_the_start_on():
    config = LambdaViTConfig(num_hidden_layers=5, attention_flags=[False, True, True, False, True])
    assert config.token_merging_schedule() == [0] * 5
    config.token_merging_r, config.token_merging_start = 8, 1
    assert config.token_merging_schedule() == [0, 0, 8, 0, 8]
    config.token_merging_r, config.token_merging_start = [1, 2, 3, 4, 5], 0
    assert config.token_merging_schedule() == [0, 2, 3, 0, 5]


def test_a_vit_config_is_taken_without_a_warning(tmp_path, caplog):
    ViTConfig(num_hidden_layers=2, hidden_size=24, num_attention_heads=2).save_pretrained(tmp_path)
    config = LambdaViTConfig.from_pretrained(tmp_path)
    assert (config.model_type, config.hidden_size, config.attention_flags) == ("lambda_vit", 24, [True, True])
    assert "You are using a model of type" not in caplog.text


def test_swin_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "swin"}))
    with pytest.raises(ValueError, match="`swin` checkpoint"):
        LambdaViTConfig.from_pretrained(tmp_path)


def test_a_deit_with_distillation_token_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "deit", "num_hidden_layers": 2}))
    with pytest.raises(ValueError, match="distillation token"):
        LambdaViTConfig.from_pretrained(tmp_path)


def test_a_broken_config_file_is_named(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(OSError, match=r"config\.json"):
        LambdaViTConfig.from_pretrained(tmp_path)


def test_removed_layers_can_be_said_in_the_words_of_transformers():
    config = LambdaViTConfig(num_hidden_layers=4, attention_flags=[False, True, False, True])
    assert config.as_per_layer_config() == {"0": {"skip": ["attention"]}, "2": {"skip": ["attention"]}}
    assert "per_layer_config" not in config.to_dict()
