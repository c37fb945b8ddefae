import pytest
import torch
from transformers import ViTConfig
from transformers.models.vit.modeling_vit import ViTLayer

from lambda_vit_hf import LambdaViTConfig
from lambda_vit_hf.removal import check_layer_indices, fold_encoder_, folded_layer_norm_eps, residual_scales


def test_each_removed_layer_doubles_the_stream_from_its_block_on():
    assert residual_scales([True, False, True, False, False]) == [1, 2, 2, 4, 8]


def test_layer_indices_are_sorted():
    assert check_layer_indices((4, 0, 2), 5) == [0, 2, 4]


@pytest.mark.parametrize("layers", [[5], [-1], [1, 1], ["1"], [True], "12", 1, None])
def test_what_is_no_set_of_layers_is_refused(layers):
    with pytest.raises(ValueError):
        check_layer_indices(layers, 5)


def test_folding_divides_what_adds_to_the_stream_and_nothing_else():
    layers = [ViTLayer(ViTConfig(hidden_size=8, num_attention_heads=2, intermediate_size=16)) for _ in range(3)]
    before = [{name: value.clone() for name, value in layer.state_dict().items()} for layer in layers]
    fold_encoder_(layers, [False, True, True])
    for layer, old, scale in zip(layers, before, [1, 2, 4], strict=True):
        for name, value in layer.state_dict().items():
            divided = name.startswith(("mlp.fc2", "attention.o_proj"))
            assert torch.equal(value, old[name] / (scale if divided else 1)), name


def test_epsilons_shrink_with_the_square_of_the_scale_in_folded_models_only():
    arguments = dict(num_hidden_layers=3, attention_flags=[False, True, False], layer_norm_eps=1e-6)
    assert folded_layer_norm_eps(LambdaViTConfig(**arguments)) == [1e-6] * 3
    assert folded_layer_norm_eps(LambdaViTConfig(**arguments, fold_removed=True)) == [1e-6 / 4, 1e-6 / 4, 1e-6 / 16]
