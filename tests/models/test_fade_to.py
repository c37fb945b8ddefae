"""What attention fades to: the identity, which doubles the stream, or nothing."""

import json

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError

from lambda_vit_hf import LambdaViTConfig, LambdaViTForImageClassification
from tests.conftest import TINY


def logits(model, pixel_values):
    with torch.no_grad():
        return model(pixel_values).logits


def test_a_removed_layer_adds_nothing_and_there_is_nothing_to_fold(model, pixel_values):
    def skip(module, arguments, output):
        return torch.zeros_like(output[0]), output[1]

    hooks = [model.encoder_layers[layer].attention.register_forward_hook(skip) for layer in (1, 3)]
    expected = logits(model, pixel_values)
    for hook in hooks:
        hook.remove()
    model.set_fade_to("skip")
    model.set_attention_lambda(0.0, [1, 3])
    assert torch.equal(logits(model, pixel_values), expected)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    model.remove_attention([1, 3])
    model.fold_removed_attention()
    assert torch.equal(logits(model, pixel_values), expected)
    assert not model.config.fold_removed and model.stream_scales() == [1.0] * 7
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def test_off_attention_has_no_gradient_but_is_seen(model, pixel_values):
    model.set_fade_to("skip")
    model.set_attention_lambda(0.0, [1])
    model.train()(pixel_values).logits.sum().backward()
    assert all(parameter.grad is None for parameter in model.encoder_layers[1].attention_parameters())


def test_prepared_compiled_and_merged_it_is_the_same_function(model, pixel_values):
    model.set_fade_to("skip")
    model.remove_attention([0, 2])
    expected = logits(model, pixel_values)
    torch.testing.assert_close(logits(torch.compile(model, backend="eager"), pixel_values), expected)
    model.set_token_merging(2)
    merged = logits(model, pixel_values)
    torch.testing.assert_close(logits(model.prepare_for_inference(), pixel_values), merged)


def test_a_graph_takes_lambda_as_it_fades(model, pixel_values):
    model.set_fade_to("skip")
    model.set_attention_lambda(0.25, [1])
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(logits(compiled, pixel_values), logits(model, pixel_values))


@pytest.mark.parametrize("wrong", ["nothing", None, 0, ["skip"]])
def test_other_words_are_refused(model, wrong):
    with pytest.raises(ValueError, match="fade_to"):
        model.set_fade_to(wrong)
    with pytest.raises(StrictDataclassError, match="fade_to"):
        LambdaViTConfig(**TINY, fade_to=wrong)
    assert model.config.fade_to == "identity"


def test_a_config_that_folds_where_nothing_doubles_is_refused():
    with pytest.raises(StrictDataclassError, match="nothing is folded"):
        LambdaViTConfig(**TINY, fade_to="skip", fold_removed=True)


@pytest.mark.parametrize("gone", ["fading", "off", "removed", "folded"])
def test_it_cannot_change_once_attention_fades(model, pixel_values, gone):
    if gone in ("fading", "off"):
        model.set_attention_lambda(0.5 if gone == "fading" else 0.0, [2])
    else:
        model.remove_attention([2])
        if gone == "folded":
            model.fold_removed_attention()
    before = logits(model, pixel_values)
    with pytest.raises(ValueError, match=r"layers \[2\] faded to 'identity'"):
        model.set_fade_to("skip")
    model.set_fade_to("identity")
    assert torch.equal(logits(model, pixel_values), before)


def test_loading_with_the_other_is_refused_where_attention_is_gone(model, tmp_path):
    model.save_pretrained(tmp_path / "whole")
    assert LambdaViTForImageClassification.from_pretrained(tmp_path / "whole", fade_to="skip").config.fade_to == "skip"
    model.remove_attention([2])
    model.save_pretrained(tmp_path / "removed")
    config = LambdaViTConfig(**TINY, fade_to="skip")
    for arguments in ({"fade_to": "skip"}, {"fade_to": "skip", "removed_layers": [2, 3]},
                      {"config": config, "removed_layers": [2]}):  # fmt: skip
        with pytest.raises(ValueError, match="removed with `fade_to='identity'`"):
            LambdaViTForImageClassification.from_pretrained(tmp_path / "removed", **arguments)


def test_a_config_of_before_there_was_a_choice_means_the_identity(model, pixel_values, tmp_path):
    model.remove_attention([2])
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    stored = json.loads(path.read_text())
    assert stored.pop("fade_to") == "identity"
    path.write_text(json.dumps(stored))
    again = LambdaViTForImageClassification.from_pretrained(tmp_path)
    assert torch.equal(logits(again, pixel_values), logits(model, pixel_values))


def test_layers_are_removed_on_loading_as_attention_fades(model, pixel_values, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = LambdaViTForImageClassification.from_pretrained(
        tmp_path, removed_layers=[1, 4], fade_to="skip", fold_removed=True
    )
    model.set_fade_to("skip")
    model.remove_attention([1, 4])
    assert torch.equal(logits(loaded, pixel_values), logits(model, pixel_values))
