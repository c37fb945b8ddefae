import numpy as np
import pytest
import torch

from lambda_vit_hf import LambdaViTConfig, LambdaViTModel
from lambda_vit_hf.models.folding import (
    centred_exponent,
    check_layer_indices,
    fold_encoder_,
    folded_layer_norm_eps,
    residual_scales,
)


def test_each_removed_layer_doubles_the_stream_from_its_block_on():
    assert residual_scales([True, False, True, False, False]) == [1, 2, 2, 4, 8]


@pytest.mark.parametrize("layers", [(4, 0, 2), {0, 2, 4}, range(0, 5, 2), np.array([4, 0, 2]), [np.int64(2), 0, 4]])
def test_layer_indices_are_sorted_and_plain_integers(layers):
    found = check_layer_indices(layers, 5)
    assert found == [0, 2, 4] and all(type(index) is int for index in found)


@pytest.mark.parametrize(
    "layers", [[5], [-1], [1, 1], ["1"], [True], [1.0], [np.bool_(True)], np.array([[1, 2]]), "12", 1, None]
)
def test_what_is_no_set_of_layers_is_refused(layers):
    with pytest.raises(ValueError):
        check_layer_indices(layers, 5)


def test_folding_divides_what_adds_to_the_stream_and_nothing_else():
    shape = dict(hidden_size=8, num_attention_heads=2, intermediate_size=16, num_hidden_layers=3)
    model = LambdaViTModel(LambdaViTConfig(**shape))
    before = [{name: value.clone() for name, value in layer.state_dict().items()} for layer in model.layers]
    embeddings = {name: value.clone() for name, value in model.embeddings.state_dict().items()}
    fold_encoder_(model.embeddings, model.layers, [0.5, 1, 4], exponent=1)
    for layer, old, divisor in zip(model.layers, before, [0.5, 1, 4], strict=True):
        for name, value in layer.state_dict().items():
            divided = name.startswith(("mlp.fc2", "attention.o_proj"))
            assert torch.equal(value, old[name] / (divisor if divided else 1)), name
    for name, value in model.embeddings.state_dict().items():
        assert torch.equal(value, 2 * embeddings[name]), name


def test_epsilons_shrink_with_the_square_of_the_scale_in_folded_models_only():
    arguments = dict(num_hidden_layers=3, attention_flags=[False, True, False], layer_norm_eps=1e-6)
    assert folded_layer_norm_eps(LambdaViTConfig(**arguments)) == [1e-6] * 3
    folded = LambdaViTConfig(**arguments, fold_removed=True)
    assert folded_layer_norm_eps(folded) == [1e-6 / 4, 1e-6 / 4, 1e-6 / 16]
    folded.fold_exponent = 2
    assert folded_layer_norm_eps(folded) == [4e-6, 4e-6, 1e-6]


@pytest.mark.parametrize(("removed", "exponent"), [(0, 0), (1, 0), (2, 1), (5, 2), (8, 4), (11, 4)])
def test_the_scale_is_centred(removed, exponent):
    flags = [index >= removed for index in range(12)]
    assert centred_exponent(flags) == exponent
    scales = residual_scales(flags, exponent)
    assert (scales[0], scales[-1]) == (2.0 ** (min(removed, 1) - exponent), 2.0 ** (removed - exponent))


@pytest.mark.parametrize("where", ["mlp.fc2", "attention.o_proj"])
def test_folding_through_an_adapter_is_refused_and_changes_nothing(model, where):
    class Adapted(torch.nn.Linear):
        pass

    model.remove_attention([0])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    parent, name = where.split(".")
    layer = getattr(model.encoder_layers[1], parent)
    old = getattr(layer, name)
    new = Adapted(old.in_features, old.out_features)
    new.load_state_dict(old.state_dict())
    setattr(layer, name, new)
    with pytest.raises(ValueError, match="Merge adapters"):
        model.fold_removed_attention()
    assert not model.config.fold_removed
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
