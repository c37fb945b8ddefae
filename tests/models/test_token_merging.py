"""Token merging: the paper's properties, and all that a merging model is used by."""

import copy
import logging

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageClassification

from lambda_vit_hf import (
    LambdaViTBackbone,
    LambdaViTConfig,
    LambdaViTForImageClassification,
    LambdaViTForMaskedImageModeling,
    LambdaViTModel,
    select_attention_layers,
)
from lambda_vit_hf.models.token_merging import (
    PAPER_SETTINGS,
    TokenFlow,
    logger,
    merge_tokens,
    most_mergeable,
    proportional_attention,
)
from tests.conftest import REMOVED, TINY, checkpoint_activations


def logits(model, pixel_values):
    with torch.no_grad():
        return model(pixel_values).logits


def token_counts(model, pixel_values) -> list[int]:
    with torch.no_grad():
        return [h.shape[1] for h in model(pixel_values, output_hidden_states=True).hidden_states]


@pytest.fixture
def tokens():
    """Tokens `(2, 17, 32)` and the keys `(2, 4, 17, 8)` they are compared by."""
    generator = torch.Generator().manual_seed(3)
    return torch.randn(2, 17, 32, generator=generator), torch.randn(2, 4, 17, 8, generator=generator)


@pytest.fixture
def merging(removed):
    """The removed model (attention in layers 1, 3, 4), merging 3 tokens in each of the last two."""
    removed.set_token_merging(3, start=1)
    return removed


# The operation.


@pytest.mark.parametrize("r", [1, 5, 8])
def test_sizes_sum_to_the_number_of_tokens(tokens, r):
    hidden_states, keys = tokens
    merged, sizes, _ = merge_tokens(hidden_states, None, keys, r)
    assert merged.shape == (2, 17 - r, 32)
    assert torch.equal(sizes.sum(dim=1), torch.full((2, 1), 17.0))
    merged, sizes, _ = merge_tokens(merged, sizes, keys[:, :, : 17 - r], 2)
    assert torch.equal(sizes.sum(dim=1), torch.full((2, 1), 17.0))


def test_the_sum_over_patches_is_kept(tokens):
    hidden_states, keys = tokens
    merged, sizes, _ = merge_tokens(hidden_states, None, keys, 6)
    merged, sizes, _ = merge_tokens(merged, sizes, keys[:, :, :11], 4)
    torch.testing.assert_close((merged * sizes).sum(dim=1), hidden_states.sum(dim=1), rtol=0, atol=1e-5)


def test_nothing_to_merge_is_the_identity(tokens):
    hidden_states, keys = tokens
    sizes = torch.ones(2, 17, 1)
    assert merge_tokens(hidden_states, sizes, keys, 0) == (hidden_states, sizes, None)


def test_the_class_token_never_merges(tokens):
    hidden_states, keys = tokens
    keys = keys.clone()
    keys[:, :, 0] = keys[:, :, 1]  # the class token looks like its neighbour
    merged, sizes, _ = merge_tokens(hidden_states, None, keys, most_mergeable(17))
    assert torch.equal(merged[:, 0], hidden_states[:, 0])
    assert torch.equal(sizes[:, 0], torch.ones(2, 1))


def test_the_most_similar_pairs_merge(tokens):
    hidden_states, keys = tokens
    keys = keys.clone()
    keys[:, :, 4], keys[:, :, 10] = 3 * keys[:, :, 7], keys[:, :, 13]  # of A and B: the same direction
    merged, sizes, _ = merge_tokens(hidden_states, None, keys, 2)
    assert sorted(sizes[0].flatten().tolist()) == [1.0] * 13 + [2.0] * 2
    b = 17 // 2 + 1 - 2  # tokens of A that are left stand before those of B
    torch.testing.assert_close(merged[:, b + 3], (hidden_states[:, 4] + hidden_states[:, 7]) / 2)
    torch.testing.assert_close(merged[:, b + 6], (hidden_states[:, 10] + hidden_states[:, 13]) / 2)


def test_equal_tokens_merge_without_loss(merging):
    # All patches alike: whatever merges, every block gives what it would have given, token for token.
    generator = torch.Generator().manual_seed(4)
    class_token, patch = torch.randn(2, 1, 32, generator=generator), torch.randn(2, 1, 32, generator=generator)
    whole = merged = torch.cat([class_token, patch.expand(-1, 16, -1)], dim=1)
    flow = TokenFlow(merging.config.token_merging_schedule())
    with torch.no_grad():
        for layer in merging.encoder_layers:
            whole = layer(whole)
            merged = layer(merged, token_flow=flow)
    assert merged.shape[1] == 11
    torch.testing.assert_close(merged, whole[:, :11], rtol=0, atol=1e-6)


def test_attention_counts_a_key_as_often_as_its_size(merging):
    generator = torch.Generator().manual_seed(5)
    once = torch.randn(1, 3, 32, generator=generator)
    layer = merging.encoder_layers[1]
    mask = proportional_attention(torch.tensor([[[1.0], [3.0], [2.0]]]), torch.float32)
    with torch.no_grad():
        output = layer.mix_tokens(once, mask)
        repeated = layer.mix_tokens(once[:, [0, 1, 1, 1, 2, 2]])
    torch.testing.assert_close(output, repeated[:, [0, 1, 4]], rtol=0, atol=1e-6)


def test_large_float16_tokens_stay_finite():
    hidden_states = torch.full((1, 17, 4), 60000.0, dtype=torch.float16)
    merged, _, _ = merge_tokens(hidden_states, None, torch.randn(1, 2, 17, 4).half(), 8)
    assert torch.equal(merged, hidden_states[:, :9])


def test_more_than_possible_is_capped_and_said_once(merging, pixel_values, caplog):
    merging.set_token_merging(100)
    type(logger).warning_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert token_counts(merging, pixel_values) == [17, 17, 9, 9, 5, 3, 3]
        logits(merging, pixel_values)
    assert caplog.text.count("asks to merge 100 tokens") == 1


# The model.


def test_r_0_is_the_identity_to_the_bit(removed, pixel_values):
    expected = logits(removed, pixel_values)
    for r in (0, [0] * 6):
        removed.set_token_merging(r)
        assert torch.equal(logits(removed, pixel_values), expected)


def test_tokens_merge_where_the_schedule_says(removed, pixel_values):
    assert token_counts(removed, pixel_values) == [17] * 7
    removed.set_token_merging(2, start=1)  # attention is in layers 1, 3, 4
    assert token_counts(removed, pixel_values) == [17, 17, 17, 17, 15, 13, 13]
    removed.set_token_merging([5, 4, 5, 0, 1, 5])  # what is said of layers without attention has no effect
    assert token_counts(removed, pixel_values) == [17, 17, 13, 13, 13, 12, 12]


def test_merging_changes_little_but_something(removed, pixel_values):
    whole = logits(removed, pixel_values)
    removed.set_token_merging(1, start=1)
    difference = (logits(removed, pixel_values) - whole).abs().max()
    assert 0 < difference < 0.1 * whole.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_eager_and_sdpa_agree(merging, pixel_values, dtype):
    merging.to(dtype)
    with_sdpa = logits(merging, pixel_values.to(dtype))
    merging.set_attn_implementation("eager")
    torch.testing.assert_close(logits(merging, pixel_values.to(dtype)), with_sdpa, rtol=0, atol=1e-6)


def test_attention_maps_have_the_tokens_of_their_layer(merging, pixel_values):
    merging.set_attn_implementation("eager")
    attentions = merging(pixel_values, output_attentions=True).attentions
    assert [tuple(a.shape) for a in attentions] == [(3, 4, 17, 17), (3, 4, 17, 17), (3, 4, 14, 14)]


def test_an_image_does_not_depend_on_its_batch(merging, pixel_values):
    whole = logits(merging, pixel_values)
    torch.testing.assert_close(logits(merging, pixel_values[1:2]), whole[1:2], rtol=0, atol=1e-6)


def test_diluted_and_switched_off_attention_merges_nothing(model, pixel_values):
    model.set_token_merging(2)
    model.set_attention_lambda(0.5, [1])
    model.set_attention_lambda(0.0, [4])
    assert token_counts(model, pixel_values) == [17, 15, 15, 13, 11, 11, 9]


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradients_are_the_same_with_gradient_checkpointing(merging, pixel_values, use_reentrant):
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            checkpoint_activations(merging, use_reentrant=use_reentrant)
        merging.zero_grad()
        merging.train()(pixel_values, labels=torch.tensor([0, 1, 2])).loss.backward()
        gradients.append({name: p.grad.clone() for name, p in merging.named_parameters() if p.grad is not None})
    assert set(gradients[0]) == {name for name, _ in merging.named_parameters()}
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


def test_mixed_precision_trains(merging, pixel_values):
    with torch.autocast("cpu", torch.bfloat16):
        merging.train()(pixel_values, labels=torch.tensor([0, 1, 2])).loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in merging.parameters())


@pytest.mark.parametrize("remote", [False, True])
def test_merging_is_saved_with_the_model(merging, pixel_values, tmp_path, monkeypatch, remote):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    merging.save_pretrained(tmp_path / "model")
    restored = AutoModelForImageClassification.from_pretrained(tmp_path / "model", trust_remote_code=remote)
    assert torch.equal(logits(restored, pixel_values), logits(merging, pixel_values))
    off = LambdaViTForImageClassification.from_pretrained(tmp_path / "model", token_merging_r=0)
    assert token_counts(off, pixel_values) == [17] * 7


def test_it_compiles_and_exports(merging, pixel_values):
    expected = logits(merging, pixel_values)
    compiled = torch.compile(copy.deepcopy(merging), backend="eager", fullgraph=True)
    torch.testing.assert_close(logits(compiled, pixel_values), expected, rtol=0, atol=1e-6)
    batch = {"pixel_values": {0: torch.export.Dim("batch", min=1, max=64)}}
    exported = torch.export.export(merging, (pixel_values,), dynamic_shapes=batch).module()
    output = exported(torch.cat([pixel_values, pixel_values])).logits
    torch.testing.assert_close(output, torch.cat([expected, expected]), rtol=0, atol=1e-6)


def test_layers_are_selected_on_the_unmerged_model(removed, pixel_values):
    expected = select_attention_layers(removed, pixel_values, num_removed_layers=1)
    removed.set_token_merging(4)
    assert select_attention_layers(removed, pixel_values, num_removed_layers=1).steps == expected.steps


def test_the_papers_settings_are_arguments_of_from_pretrained(vit_folder):
    assert len(PAPER_SETTINGS) == 7
    for settings in PAPER_SETTINGS.values():
        config = LambdaViTConfig(token_merging_r=settings["token_merging_r"])
        assert max(settings["removed_layers"]) < config.num_hidden_layers
    arguments = {**PAPER_SETTINGS["small_25_r22"], "token_merging_r": 2}
    model = LambdaViTForImageClassification.from_pretrained(vit_folder, **arguments)  # 6 layers, removed 0 2 4
    assert model.config.token_merging_schedule() == [0, 0, 0, 2, 0, 2]


# What cannot be.


@pytest.mark.parametrize(
    ("r", "start", "said"),
    [
        (-1, 0, "0 or more"),
        ([1, 1], 0, "expected 6"),
        ([1] * 6, 1, "a list says itself"),
        (2, 3, "index among the layers"),
        (2, -1, "0 or more"),
        (2.5, 0, "token_merging_r"),
        (True, 0, "token_merging_r"),
    ],
)
def test_a_wrong_schedule_is_refused_and_changes_nothing(removed, pixel_values, r, start, said):
    with pytest.raises(ValueError, match=said):
        removed.set_token_merging(r, start)
    assert removed.config.token_merging_r == 0
    assert token_counts(removed, pixel_values) == [17] * 7


@pytest.mark.parametrize("r", [np.int64(3), (0, 3, 0, 1, 0, 0), np.array([0, 3, 0, 1, 0, 0])], ids=str)
def test_numbers_of_numpy_are_saved_as_plain_ones(model, tmp_path, r):
    model.set_token_merging(r, np.int64(0))
    model.save_pretrained(tmp_path)
    assert LambdaViTForImageClassification.from_pretrained(tmp_path).config.token_merging_r == np.asarray(r).tolist()


def test_a_removal_that_leaves_no_first_merging_block_is_refused(merging, pixel_values):
    merging.set_token_merging(2, start=2)
    with pytest.raises(ValueError, match="set_token_merging"):
        merging.remove_attention([3])
    assert merging.config.removed_layers == REMOVED


@pytest.mark.parametrize("kind", [LambdaViTBackbone, LambdaViTForMaskedImageModeling])
def test_models_that_need_every_patch_refuse(kind, merging, tmp_path):
    with pytest.raises(ValueError, match="every patch"):
        kind(LambdaViTConfig(**TINY, token_merging_r=1))
    model = kind(LambdaViTConfig(**TINY))
    with pytest.raises(ValueError, match="every patch"):
        model.set_token_merging(1)
    assert model.config.token_merging_r == 0
    merging.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="token_merging_r=0"):
        LambdaViTBackbone.from_pretrained(tmp_path)
    LambdaViTBackbone.from_pretrained(tmp_path, token_merging_r=0)


def test_an_attention_mask_or_another_attention_is_refused(merging, pixel_values):
    with pytest.raises(ValueError, match="attention_mask"):
        merging(pixel_values, attention_mask=torch.ones(3, 17))
    merging.config._attn_implementation_internal = "flash_attention_2"
    with pytest.raises(ValueError, match="additive mask"):
        merging(pixel_values)


def test_the_bare_model_gives_the_tokens_that_are_left(merging, pixel_values, tmp_path):
    merging.save_pretrained(tmp_path)
    output = LambdaViTModel.from_pretrained(tmp_path, add_pooling_layer=False)(pixel_values)
    assert output.last_hidden_state.shape == (3, 11, 32)


def test_merging_edited_into_the_config_acts_at_once_and_is_saved(model, pixel_values, tmp_path):
    model.config.token_merging_r = 2
    hidden_states = model.vit(pixel_values).last_hidden_state
    assert hidden_states.shape[1] == 17 - 6 * 2
    model.save_pretrained(tmp_path)
    again = LambdaViTForImageClassification.from_pretrained(tmp_path)
    assert torch.equal(again.vit(pixel_values).last_hidden_state, hidden_states)


@pytest.mark.parametrize(("r", "start"), [(2, 0), (2, 1), (1, 3), ([0, 1, 2, 1, 2, 1], 0)])
@pytest.mark.parametrize("gone", [[0], [0, 1], [2, 4]])
def test_merging_is_the_same_before_and_after_a_layer_is_removed(model, pixel_values, r, start, gone):
    model.set_token_merging(r, start=start)
    model.set_attention_lambda(0.0, gone)
    with torch.no_grad():
        before = model(pixel_values).logits
        model.remove_attention(gone)
        assert torch.equal(model(pixel_values).logits, before)
        model.fold_removed_attention()
        assert torch.equal(model(pixel_values).logits, before)


def test_a_layer_that_fades_counts_as_gone_in_the_schedule(model, pixel_values):
    model.set_token_merging(6, start=1)
    model.set_attention_lambda(0.5, [0, 1])
    sizes = []
    for layer in model.encoder_layers:
        layer.register_forward_hook(lambda *call: sizes.append(call[-1].shape[1]))
    model(pixel_values)
    assert sizes == [17, 17, 17, 11, 6, 4]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_does_not_change_which_tokens_are_alike(dtype):
    # Cosines that differ in the third digit: in eight bits the best partner would be lost.
    generator = torch.Generator().manual_seed(0)
    common = torch.randn(1, 1, 1, 64, generator=generator)
    keys = common + 0.08 * torch.randn(1, 1, 33, 64, generator=generator)
    hidden_states = torch.randn(1, 33, 8, generator=generator)
    expected, _, _ = merge_tokens(hidden_states, None, keys, 8)
    with torch.autocast("cpu", dtype):
        found, _, _ = merge_tokens(hidden_states, None, keys, 8)
    assert torch.equal(found, expected)


def test_tokens_are_alike_by_the_direction_of_their_keys_not_by_their_length():
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(1, 1, 9, 4, generator=generator)
    keys[0, 0, 2] = torch.tensor([1.0, 0.0, 0.0, 0.0])
    keys[0, 0, 3] = torch.tensor([0.1, 0.0, 0.0, 0.0])  # the same direction as token 2
    keys[0, 0, 5] = torch.tensor([50.0, 50.0, 0.0, 0.0])  # a larger product with it
    hidden_states = torch.randn(1, 9, 8, generator=generator)
    merged, sizes, _ = merge_tokens(hidden_states, None, keys, 1)
    (place,) = (sizes[0, :, 0] == 2).nonzero().flatten().tolist()
    torch.testing.assert_close(merged[0, place], (hidden_states[0, 2] + hidden_states[0, 3]) / 2)
