"""A model prepared for inference: the same logits, the same files, and nothing else to be done with it."""

import copy

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from safetensors.torch import load_file
from torch import nn

from lambda_vit_hf import (
    LambdaViTBackbone,
    LambdaViTConfig,
    LambdaViTForImageClassification,
    LambdaViTForMaskedImageModeling,
    LambdaViTModel,
)
from tests.conftest import TINY, perturb


def logits(model, pixel_values):
    with torch.no_grad():
        return model(pixel_values).logits


def tokens_computed(model, pixel_values) -> list[int]:
    """Tokens that each block's MLP sees."""
    seen = []
    handles = [layer.mlp.register_forward_hook(lambda m, i, o: seen.append(o.shape[1])) for layer in model.vit.layers]
    logits(model, pixel_values)
    for handle in handles:
        handle.remove()
    return seen


@pytest.fixture(params=["removed", "whole", "merging", "last attention removed early", "no bias"])
def before(request, model):
    """Models to prepare, in evaluation mode."""
    if request.param == "no bias":
        torch.manual_seed(0)
        return perturb(LambdaViTForImageClassification(LambdaViTConfig(**TINY, qkv_bias=False)))
    if request.param != "whole":
        model.remove_attention([3, 4, 5] if request.param == "last attention removed early" else [0, 2, 5])
    if request.param == "merging":
        model.set_token_merging(3)
    return model


@pytest.fixture
def prepared(removed):
    return copy.deepcopy(removed).prepare_for_inference()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_logits_stay(before, pixel_values, attention):
    before.set_attn_implementation(attention)
    expected = logits(before, pixel_values)
    prepared = before.prepare_for_inference()
    torch.testing.assert_close(logits(prepared, pixel_values), expected, rtol=0, atol=1e-5)
    output = prepared(pixel_values, output_hidden_states=True)
    torch.testing.assert_close(output.logits, expected, rtol=0, atol=1e-5)
    assert len(output.hidden_states) == 7


def test_one_linear_layer_gives_query_key_and_value(prepared, removed):
    names = {name.rsplit(".", 1)[-1] for name, module in prepared.named_modules() if isinstance(module, nn.Linear)}
    assert names == {"qkv_proj", "o_proj", "fc1", "fc2", "classifier"}
    assert sum(p.numel() for p in prepared.parameters()) == sum(p.numel() for p in removed.parameters())
    assert not [module for module in prepared.vit.layers.modules() if isinstance(module, nn.Dropout)]


def test_from_the_last_attention_on_only_the_class_token_is_computed(removed, pixel_values):
    every_token = copy.deepcopy(removed).prepare_for_inference(class_token_only=False)
    assert tokens_computed(every_token, pixel_values) == [17] * 6
    prepared = removed.prepare_for_inference()  # attention is in layers 1, 3, 4
    assert tokens_computed(prepared, pixel_values) == [17, 17, 17, 17, 1, 1]
    torch.testing.assert_close(logits(prepared, pixel_values), logits(every_token, pixel_values), rtol=0, atol=1e-6)


def test_all_tokens_are_there_for_who_asks(removed, pixel_values):
    expected = removed(pixel_values, output_hidden_states=True).hidden_states
    prepared = removed.prepare_for_inference()
    states = prepared(pixel_values, output_hidden_states=True).hidden_states
    for ours, theirs in zip(states, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    prepared.set_attn_implementation("eager")
    attentions = prepared(pixel_values, output_attentions=True).attentions
    assert [tuple(a.shape) for a in attentions] == [(3, 4, 17, 17)] * 3


@pytest.mark.parametrize("mask", [None, [1] * 10 + [0] * 7])
def test_an_attention_mask_has_its_effect(removed, pixel_values, mask):
    mask = None if mask is None else torch.tensor([mask] * 3)
    with torch.no_grad():
        expected = removed(pixel_values, attention_mask=mask).logits
        output = removed.prepare_for_inference()(pixel_values, attention_mask=mask).logits
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-5)


def test_an_unfolded_model_is_folded(model, pixel_values):
    model.remove_attention([0, 2, 5])
    assert model.prepare_for_inference().config.fold_removed


def test_the_saved_files_are_those_of_the_model_before(prepared, removed, pixel_values, tmp_path):
    removed.save_pretrained(tmp_path / "before")
    prepared.save_pretrained(tmp_path / "prepared")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("before", "prepared"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    configs = [(tmp_path / name / "config.json").read_text() for name in ("before", "prepared")]
    assert configs[0] == configs[1]
    restored = LambdaViTForImageClassification.from_pretrained(tmp_path / "prepared")
    assert torch.equal(logits(restored, pixel_values), logits(removed, pixel_values))


def test_weights_can_be_loaded_into_it(prepared, removed, pixel_values):
    perturb(removed, seed=1)
    assert prepared.load_state_dict(removed.state_dict()).missing_keys == []
    torch.testing.assert_close(logits(prepared, pixel_values), logits(removed, pixel_values), rtol=0, atol=1e-5)


def test_other_models_are_prepared_too(pixel_values):
    torch.manual_seed(0)
    config = {**TINY, "encoder_stride": 4, "attention_flags": [True, False] * 3, "fold_removed": True}
    bare = perturb(LambdaViTModel(LambdaViTConfig(**config)))
    masked = perturb(LambdaViTForMaskedImageModeling(LambdaViTConfig(**config)))
    backbone = perturb(LambdaViTBackbone(LambdaViTConfig(**config, out_indices=[1, 5])))
    with torch.no_grad():
        for model, read in (
            (bare, lambda output: output.last_hidden_state),
            (bare, lambda output: output.pooler_output),
            (masked, lambda output: output.reconstruction),
            (backbone, lambda output: torch.cat(output.feature_maps)),
        ):
            expected = read(copy.deepcopy(model)(pixel_values))
            output = read(copy.deepcopy(model).prepare_for_inference()(pixel_values))
            torch.testing.assert_close(output, expected, rtol=0, atol=1e-5)


def test_preparing_twice_is_preparing_once(prepared, pixel_values):
    expected = logits(prepared, pixel_values)
    assert prepared.prepare_for_inference() is prepared
    assert torch.equal(logits(prepared, pixel_values), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_it_changes_dtype_and_is_copied_like_any_model(prepared, removed, pixel_values, dtype):
    copied = copy.deepcopy(prepared).to(dtype)
    expected = logits(removed.to(dtype), pixel_values.to(dtype))
    tolerance = {torch.bfloat16: 0.05, torch.float16: 0.01, torch.float64: 1e-10}[dtype]
    torch.testing.assert_close(logits(copied, pixel_values.to(dtype)), expected, rtol=0, atol=tolerance)


def test_it_compiles_and_exports(prepared, pixel_values):
    expected = logits(prepared, pixel_values)
    compiled = torch.compile(copy.deepcopy(prepared), backend="eager", fullgraph=True)
    torch.testing.assert_close(logits(compiled, pixel_values), expected, rtol=0, atol=1e-6)
    batch = {"pixel_values": {0: torch.export.Dim("batch", min=1, max=64)}}
    exported = torch.export.export(prepared, (pixel_values,), dynamic_shapes=batch).module()
    torch.testing.assert_close(exported(pixel_values[:2]).logits, expected[:2], rtol=0, atol=1e-6)


# What cannot be done, before and after.


def test_a_model_in_training_or_half_diluted_is_refused(model):
    with pytest.raises(ValueError, match=r"model\.eval\(\)"):
        model.train().prepare_for_inference()
    model.eval().set_attention_lambda(0.5, [1])
    with pytest.raises(ValueError, match="Layers \\[1\\]"):
        model.prepare_for_inference()
    model.set_attention_lambda(1.0, [1])
    model.prepare_for_inference()


def test_adapters_are_not_lost_but_refused(model):
    inject_adapter_in_model(LoraConfig(target_modules=["q_proj"]), model)
    with pytest.raises(ValueError, match="q_proj is a Linear of peft"):
        model.eval().prepare_for_inference()


@pytest.mark.parametrize(
    "call",
    [
        lambda model: model.train(),
        lambda model: model.vit.train(),
        lambda model: model.remove_attention([1]),
        lambda model: model.set_attention_lambda(0.5, [1]),
    ],
)
def test_it_can_neither_be_trained_nor_changed(prepared, pixel_values, call):
    expected = logits(prepared, pixel_values)
    with pytest.raises(ValueError, match="load it again"):
        call(prepared)
    prepared.eval()
    assert torch.equal(logits(prepared, pixel_values), expected)


@pytest.mark.parametrize(
    ("dtype", "capability", "warns"),
    [(torch.bfloat16, "AVX2", True), (torch.bfloat16, "AVX512", False), (torch.float32, "AVX2", False)],
    ids=str,
)
def test_where_a_cpu_has_no_instructions_for_bfloat16_it_says_so(model, monkeypatch, caplog, dtype, capability, warns):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    model.to(dtype).prepare_for_inference()
    assert ("no instructions for bfloat16" in caplog.text) == warns
