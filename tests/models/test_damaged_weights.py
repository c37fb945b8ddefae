"""What is damaged, or belongs to another model, is refused when it is loaded, before anything is computed with it."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from lambda_vit_hf import LambdaViTConfig, LambdaViTForImageClassification


def edit_weights(folder, name, change):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors[name] = change(tensors[name])
    save_file(tensors, path, metadata={"format": "pt"})


def edit_config(folder, **values):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def load(folder):
    return LambdaViTForImageClassification.from_pretrained(folder)


@pytest.fixture
def saved(model, tmp_path):
    model.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", ["vit.layers.1.mlp.fc1.weight", "vit.embeddings.cls_token", "classifier.bias"])
def test_weights_that_are_no_numbers_are_refused_by_name(saved, name, bad):
    def spoil(tensor):
        tensor.flatten()[0] = bad
        return tensor

    edit_weights(saved, name, spoil)
    with pytest.raises(ValueError, match=name.replace(".", r"\.")):
        load(saved)


@pytest.mark.parametrize("value", [-0.1, 1.5, 1e30])
def test_a_lambda_out_of_range_is_refused(saved, value):
    edit_weights(saved, "vit.layers.3.attention_lambda", lambda tensor: torch.full_like(tensor, value))
    with pytest.raises(ValueError, match="Lambda must lie in"):
        load(saved)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.bool])
def test_integer_weights_are_refused(saved, dtype):
    edit_weights(saved, "vit.layers.1.mlp.fc1.weight", lambda tensor: tensor.to(dtype))
    with pytest.raises(ValueError, match="integers"):
        load(saved)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("layer_norm_eps", 0.0), ("layer_norm_eps", -1e-6), ("layer_norm_eps", float("nan")),
        ("layer_norm_eps", float("inf")), ("initializer_range", 0.0), ("initializer_range", -1.0),
        ("patch_size", 0), ("image_size", 0), ("num_hidden_layers", 10**7), ("num_hidden_layers", 0),
        ("hidden_size", 10**9), ("num_attention_heads", 0), ("intermediate_size", 0), ("num_channels", 0),
        ("fold_exponent", 7), ("token_merging_r", -1),
    ],
)  # fmt: skip
def test_sizes_out_of_any_range_are_refused_at_once(saved, field, value):
    edit_config(saved, **{field: value})
    with pytest.raises(Exception, match=field):
        load(saved)


@pytest.mark.parametrize("exponent", [-1, 3, 40])
def test_a_fold_exponent_beyond_the_removed_layers_is_refused(exponent):
    flags = [False, False, True, True]
    with pytest.raises(Exception, match="fold_exponent"):
        LambdaViTConfig(num_hidden_layers=4, attention_flags=flags, fold_removed=True, fold_exponent=exponent)


PARTS, WHOLE = {"max_shard_size": "20KB"}, {}


@pytest.mark.parametrize(("first", "second"), [(PARTS, WHOLE), (WHOLE, PARTS), (PARTS, PARTS), (WHOLE, WHOLE)])
def test_the_weights_saved_last_are_those_that_load(model, pixel_values, tmp_path, first, second):
    model.save_pretrained(tmp_path, **first)
    with torch.no_grad():
        model.classifier.weight.mul_(2)
        expected = model(pixel_values).logits
    model.save_pretrained(tmp_path, **second)
    with torch.no_grad():
        assert torch.equal(load(tmp_path)(pixel_values).logits, expected)
    assert (tmp_path / "model.safetensors").is_file() != (tmp_path / "model.safetensors.index.json").is_file()


def test_weights_that_are_there_twice_are_refused(model, tmp_path):
    model.save_pretrained(tmp_path, **PARTS)
    save_file(model.state_dict(), tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="weights twice"):
        load(tmp_path)


@pytest.mark.parametrize(("field", "value"), [("num_labels", 10**9), ("num_labels", 2.5), ("id2label", [1, 2])])
def test_labels_beyond_counting_are_refused_at_once(saved, field, value):
    edit_config(saved, **{"id2label": None, "label2id": None, field: value})  # 10**9 names took 100 GB
    with pytest.raises(ValueError, match=field):
        load(saved)
