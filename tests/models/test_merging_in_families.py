"""Merging tokens in every family that can: patches count as often as before, and what stands in front never merges."""

import copy

import pytest
import torch
from transformers import AutoModel

from lambda_vit_hf import AutoLambdaModel, AutoLambdaModelForImageClassification
from lambda_vit_hf.evaluation.accounting import count_macs
from lambda_vit_hf.models.families import FAMILIES, family_class
from lambda_vit_hf.models.token_merging import merge_tokens, most_mergeable
from tests.conftest import checkpoint_activations
from tests.models.test_families import BARE, CLASSIFIERS, SHAPE, features, trained_looking


MERGING = [name for name in BARE if not name.startswith("dinov3")]
HALF = [8, 0, 0, 0, 0, 0]  # of 16 patches


@pytest.fixture(params=MERGING)
def model(request, tmp_path):
    torch.manual_seed(0)
    trained_looking(BARE[request.param]()).save_pretrained(tmp_path)
    model = AutoLambdaModel.from_pretrained(tmp_path)
    model.eval()
    return model


@pytest.fixture(params=[*CLASSIFIERS, "siglip_vision_model", "clip_vision_model"])
def classifier(request, tmp_path):
    torch.manual_seed(0)
    (CLASSIFIERS.get(request.param) or BARE[request.param])().save_pretrained(tmp_path)
    return trained_looking(AutoLambdaModelForImageClassification.from_pretrained(tmp_path, num_labels=5))


@pytest.fixture
def twins():
    """Images of 4 x 4 patches, each of which is there twice: one of set B, one of set A."""
    generator = torch.Generator().manual_seed(1)
    patches = torch.randn(3, 8, 3, 4, 4, generator=generator)
    rows = []
    for image in patches:
        grid = torch.empty(16, 3, 4, 4)
        grid[::2], grid[1::2] = image, image[torch.randperm(8, generator=generator)]
        rows.append(grid.view(4, 4, 3, 4, 4).permute(2, 0, 3, 1, 4).reshape(3, 16, 16))
    return torch.stack(rows)


def without_positions(model):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "position_embedding" in name:
                parameter.zero_()
    return model


def test_equal_patches_merge_without_loss_and_each_gets_its_feature_back(model, twins):
    without_positions(model)
    whole = features(model, twins)
    model.set_token_merging(HALF)
    merged = features(model, twins)
    prefix = model.num_prefix_tokens
    if model.reads_patches:
        assert merged[0].shape == whole[0].shape
    else:
        assert merged[0].shape[1] == prefix + 8
        whole[0], merged[0] = whole[0][:, :prefix], merged[0][:, :prefix]
    for one, other in zip(merged, whole, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=2e-5 * float(other.abs().max()))


def test_logits_count_every_patch_once(classifier, twins):
    without_positions(classifier)
    with torch.no_grad():
        whole = classifier(twins).logits
        classifier.set_token_merging(HALF)
        merged = classifier(twins).logits
    torch.testing.assert_close(merged, whole, rtol=0, atol=2e-5 * float(whole.abs().max()))


def test_tokens_get_fewer_and_the_logits_other_ones(classifier, pixel_values):
    seen = []
    for layer in classifier.encoder_layers:
        layer.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0].shape[1]))
    with torch.no_grad():
        whole = classifier(pixel_values).logits
        classifier.set_token_merging(3)
        merged = classifier(pixel_values).logits
    prefix = classifier.num_prefix_tokens
    # 16 patches less 3 in each block, until less than twice as many are left.
    assert [count - prefix for count in seen[6:]] == [16, 13, 10, 7, 4, 2]
    assert 0 < (merged - whole).abs().max() < whole.abs().max()


def test_one_function_before_and_after_removal_folded_prepared_saved_and_computed_again(
    classifier, pixel_values, tmp_path
):
    classifier.set_token_merging(3, start=1)
    classifier.set_attention_lambda(0.0, [1, 3])
    with torch.no_grad():
        off = classifier(pixel_values).logits
        classifier.remove_attention([1, 3])
        assert torch.equal(classifier(pixel_values).logits, off)
        classifier.fold_removed_attention()
        assert torch.equal(classifier(pixel_values).logits, off)
        classifier.save_pretrained(tmp_path / "merged")
        again = AutoLambdaModelForImageClassification.from_pretrained(tmp_path / "merged").eval()
        assert torch.equal(again(pixel_values).logits, off)
        prepared = copy.deepcopy(again).prepare_for_inference()
        torch.testing.assert_close(prepared(pixel_values).logits, off, rtol=0, atol=1e-5)
        asked = again(pixel_values, output_hidden_states=True)
    torch.testing.assert_close(asked.logits, off, rtol=0, atol=1e-5)
    whole = copy.deepcopy(again.config)
    whole.token_merging_r, whole.token_merging_start = 0, 0
    assert count_macs(again.config) < count_macs(whole)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradients_are_the_same_with_gradient_checkpointing(classifier, pixel_values, use_reentrant):
    classifier.set_token_merging(3)
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            checkpoint_activations(classifier, use_reentrant=use_reentrant)
        classifier.zero_grad()
        torch.manual_seed(0)
        classifier.train()(pixel_values).logits.square().sum().backward()
        gradients.append({name: p.grad.clone() for name, p in classifier.named_parameters() if p.grad is not None})
    assert gradients[0] and gradients[0].keys() == gradients[1].keys()
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


@pytest.mark.parametrize("classifier", ["dinov2_with_registers", "siglip_vision_model"], indirect=True)
def test_it_compiles_and_exports(classifier, pixel_values):
    classifier.set_token_merging(3)
    with torch.no_grad():
        expected = classifier(pixel_values).logits
        compiled = torch.compile(copy.deepcopy(classifier), backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(pixel_values).logits, expected, rtol=0, atol=1e-5)
        batch = {"pixel_values": {0: torch.export.Dim("batch", min=1, max=64)}}
        exported = torch.export.export(classifier, (pixel_values,), dynamic_shapes=batch).module()
        both = exported(torch.cat([pixel_values, pixel_values])).logits
    torch.testing.assert_close(both, torch.cat([expected, expected]), rtol=0, atol=1e-5)


def test_a_saved_encoder_opens_in_auto_classes_and_gives_the_same(model, pixel_values, tmp_path):
    model.set_token_merging(2)
    model.save_pretrained(tmp_path / "merging")
    again = AutoModel.from_pretrained(tmp_path / "merging").eval()
    for one, other in zip(features(again, pixel_values), features(model, pixel_values), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("prefix", [0, 1, 2, 5])
def test_what_stands_in_front_never_merges_and_every_place_is_right(prefix):
    generator = torch.Generator().manual_seed(prefix)
    tokens = torch.randn(2, prefix + 9, 8, generator=generator)
    keys, later_keys = (torch.randn(2, 2, prefix + count, 4, generator=generator) for count in (9, 6))
    places = torch.arange(prefix + 9).expand(2, -1)
    first, sizes, places = merge_tokens(tokens, None, keys, 3, prefix, places)
    second, sizes, places = merge_tokens(first, sizes, later_keys, 2, prefix, places)
    assert torch.equal(second[:, :prefix], tokens[:, :prefix])
    assert torch.equal(places[:, :prefix], torch.arange(prefix).expand(2, -1))
    # By the places alone: each token is the mean of what went into it, and as large as their number.
    for image in range(2):
        for place in range(second.shape[1]):
            members = tokens[image, places[image] == place]
            assert len(members) == sizes[image, place]
            torch.testing.assert_close(members.mean(dim=0), second[image, place], rtol=0, atol=1e-6)


@pytest.mark.parametrize(("tokens", "prefix", "most"), [(17, 1, 8), (18, 2, 8), (16, 0, 8), (18, 1, 8), (3, 3, 0)])
def test_the_most_that_can_merge_leaves_half_of_the_patches(tokens, prefix, most):
    assert most_mergeable(tokens, prefix) == most
    merged, _, _ = merge_tokens(torch.randn(1, tokens, 4), None, torch.randn(1, 1, tokens, 4), 100, prefix)
    assert merged.shape[1] == tokens - most


def test_models_that_need_every_patch_in_every_block_refuse():
    config = family_class("dinov3_vit", "Config")(**SHAPE, token_merging_r=1)
    with pytest.raises(ValueError, match="cannot merge tokens"):
        family_class("dinov3_vit", "ForImageClassification")(config)
    for model_type in ("dinov2", "dinov2_with_registers"):
        backbone = family_class(model_type, "Backbone")
        with pytest.raises(ValueError, match="cannot merge tokens"):
            backbone(backbone.config_class(**SHAPE, token_merging_r=1))
        edited = backbone(backbone.config_class(**SHAPE))
        edited.config.token_merging_r = 1
        with pytest.raises(ValueError, match="cannot merge tokens"):
            edited(torch.randn(1, 3, 16, 16))
    assert {name.partition(",")[0] for name in MERGING} == {
        name for name in BARE if name in FAMILIES and name != "dinov3_vit"
    }
