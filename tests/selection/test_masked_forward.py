"""Masked forward passes: the right outputs, each shared prefix computed once, and counted."""

import copy
import itertools

import pytest
import torch

from lambda_vit_hf.models.configuration_lambda_dinov2 import LambdaDinov2Config
from lambda_vit_hf.models.modeling_lambda_dinov2 import LambdaDinov2ForImageClassification
from lambda_vit_hf.selection.masked_forward import MASKS, OUTPUTS, MaskedForward
from tests.conftest import TINY, perturb
from tests.numpy_vit import masked_output


SETS = [[], [0], [5], [0, 5], [2, 3], [3, 2], [3, 4, 5], [4, 5], [0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5]]


@pytest.mark.parametrize("reuse_prefixes", [True, False])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("output", OUTPUTS)
@torch.no_grad()
def test_outputs_are_those_of_the_definition(model, pixel_values, output, mask, reuse_prefixes):
    model, pixel_values = model.double(), pixel_values.double()
    forward = MaskedForward(model, output, mask, reuse_prefixes)
    found = {position: features for positions, features in forward(pixel_values, SETS) for position in positions}
    assert sorted(found) == list(range(len(SETS)))
    for position, masked in enumerate(SETS):
        expected = torch.from_numpy(masked_output(model, pixel_values, masked, mask, output))
        torch.testing.assert_close(found[position], expected, rtol=1e-9, atol=1e-12, msg=f"{masked}")


@torch.no_grad()
def test_layers_removed_before_stay_removed(model, pixel_values):
    model.remove_attention([1, 5])
    forward = MaskedForward(model, "class_head", "identity")
    found = {position: scores for positions, scores in forward(pixel_values, [[], [4]]) for position in positions}
    torch.testing.assert_close(found[0], model(pixel_values).logits)
    model.remove_attention([4])
    torch.testing.assert_close(found[1], model(pixel_values).logits)


@torch.no_grad()
def test_a_head_that_reads_patch_tokens_too_gets_them(pixel_values):
    model = perturb(LambdaDinov2ForImageClassification(LambdaDinov2Config(**TINY)))
    sets = [[], [5], [3, 4, 5], [0, 1, 2, 3, 4]]
    forward = MaskedForward(model, "class_head", "identity")
    found = {position: scores for positions, scores in forward(pixel_values, sets) for position in positions}
    for position, layers in enumerate(sets):
        removed = copy.deepcopy(model)
        removed.remove_attention(layers)
        torch.testing.assert_close(found[position], removed(pixel_values).logits)


@torch.no_grad()
@pytest.mark.parametrize(
    ("sets", "blocks"),
    [
        ([[]], 6),
        ([[], [5]], 7),  # parts from the whole model at its last block
        ([[], [0]], 12),  # at its first
        ([[], [0], [0], [0, 5]], 13),
        ([[0, 3], [1, 3], [3], [0], []], 6 + 6 + 5 + 2 * 3),
        ([list(one) for size in range(7) for one in itertools.combinations(range(6), size)], 2 * (2**6 - 1)),
    ],
    ids=str,
)
def test_each_shared_prefix_is_computed_once(model, pixel_values, sets, blocks):
    computed = []
    for layer in model.encoder_layers:
        layer.mlp.register_forward_hook(lambda module, args, output: computed.append(len(output)))
    reusing, naive = (MaskedForward(model, "token_mean", "skip", reuse) for reuse in (True, False))
    list(reusing(pixel_values, sets))
    assert sum(computed) == reusing.blocks == 3 * blocks
    list(naive(pixel_values, sets))
    assert sum(computed) == reusing.blocks + naive.blocks
    assert naive.blocks == 3 * 6 * len(sets)


@torch.no_grad()
def test_above_the_last_attention_the_class_token_alone_is_computed_where_nothing_else_is_read(model, pixel_values):
    shapes = []
    for layer in model.encoder_layers:
        layer.mlp.register_forward_hook(lambda module, args, output: shapes.append(output.shape[1]))
    for output in ("class_head", "class_token"):
        for masked, alone in (([], 1), ([5], 2), ([3, 5], 2), ([3, 4, 5], 4), ([0, 1, 2, 3, 4], 1)):
            shapes.clear()
            list(MaskedForward(model, output, "skip")(pixel_values, [masked]))
            assert shapes == [17] * (6 - alone) + [1] * alone, masked
    for reuse, output in ((True, "token_mean"), (False, "class_head")):
        shapes.clear()
        list(MaskedForward(model, output, "skip", reuse)(pixel_values, [[5]]))
        assert shapes == [17] * 6
