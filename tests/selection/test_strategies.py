"""Each strategy takes the layers that it says."""

import copy
import functools
import itertools
import json
import random

import numpy as np
import pytest
import torch

from lambda_vit_hf import select_attention_layers
from lambda_vit_hf.selection import layer_scores, strategies
from lambda_vit_hf.selection.select import AttentionSelection
from lambda_vit_hf.selection.strategies import beam


def test_first_last_and_random(model, images):
    assert select_attention_layers(model, images, num_removed_layers=2, strategy="first").layers == [0, 1]
    assert select_attention_layers(model, images, num_removed_layers=2, strategy="last").layers == [4, 5]
    drawn = select_attention_layers(model, images, num_removed_layers=3, strategy="random", seed=5).order
    assert drawn == random.Random(5).sample(range(6), 3)


def test_exhaustive_search_finds_the_least_of_all_sets(model, images):
    sets = list(itertools.combinations(range(6), 3))
    values = {}

    def measure_all(search):
        values.update(zip(sets, search.transfer_entropy(sets), strict=True))
        return [0, 1, 2]

    select_attention_layers(model, images, num_removed_layers=3, strategy=measure_all)
    best = min(sets, key=lambda chosen: abs(values[chosen]))
    selection = select_attention_layers(model, images, num_removed_layers=3, strategy="exhaustive")
    assert selection.layers == list(best)
    assert selection.transfer_entropy == pytest.approx(values[best])


def test_too_many_sets_for_an_exhaustive_search_are_refused(images, monkeypatch, model):
    monkeypatch.setattr(strategies, "MOST_SETS", 19)
    with pytest.raises(ValueError, match="20 sets are too many"):
        select_attention_layers(model, images, num_removed_layers=3, strategy="exhaustive")


def test_a_beam_of_one_is_nose_and_a_full_beam_is_exhaustive(model, images):
    narrow, nose = (
        select_attention_layers(model, images, num_removed_layers=3, strategy=s) for s in (beam(1), "nose")
    )
    assert narrow.order == nose.order
    full = select_attention_layers(model, images, num_removed_layers=3, strategy=beam(99))
    exhaustive = select_attention_layers(model, images, num_removed_layers=3, strategy="exhaustive")
    assert full.layers == exhaustive.layers
    middle = select_attention_layers(model, images, num_removed_layers=3, strategy="beam")
    for other in (middle, nose):
        assert abs(exhaustive.transfer_entropy) <= abs(other.transfer_entropy) * (1 + 1e-9)  # rounding of sums


def test_lowest_entropy_sorts_by_the_attentions_own_entropy(model, images):
    selection = select_attention_layers(model, images, num_removed_layers=2, strategy="lowest_entropy")
    assert selection.order == sorted(range(6), key=lambda layer: selection.attention_entropy[layer])[:2]


def test_cosine_takes_the_layers_that_turn_the_stream_least(model, images):
    streams = []
    for layer in model.encoder_layers:
        layer.register_forward_pre_hook(lambda module, args: streams.append((args[0], module.mix_tokens(args[0]))))
    with torch.no_grad():
        model(images)
    influence = [(1 - torch.cosine_similarity(x, mixed, dim=-1)).mean().item() for x, mixed in streams]
    for layer in model.encoder_layers:
        layer._forward_pre_hooks.clear()
    selection = select_attention_layers(model, images, num_removed_layers=3, strategy="cosine", batch_size=7)
    assert selection.order == sorted(range(6), key=influence.__getitem__)[:3]


def test_a_strategy_can_be_a_users_function(model, images):
    def least_alone(search):
        values = search.transfer_entropy([[layer] for layer in search.candidates])
        return sorted(search.candidates, key=lambda layer: abs(values[layer]))[: search.num_layers]

    selection = select_attention_layers(model, images, num_removed_layers=2, strategy=least_alone)
    assert selection.strategy == "least_alone"
    assert AttentionSelection.from_dict(json.loads(json.dumps(selection.to_dict()))) == selection
    with pytest.raises(ValueError, match="'least_alone' was a function"):
        select_attention_layers(model, images, num_removed_layers=2, selection=selection.config)
    assert selection.order[0] == select_attention_layers(model, images, num_removed_layers=1).order[0]


@pytest.mark.parametrize("answer", [[0, 0], [0], [0, 1, 2], [0, 9]], ids=str)
def test_a_strategy_that_gives_something_else_than_asked_for_is_refused(model, answer):
    with pytest.raises(ValueError, match="expected 2 different layers"):
        select_attention_layers(model, torch.randn(4, 3, 16, 16), num_removed_layers=2, strategy=lambda search: answer)


def test_a_strategy_without_a_name_is_called_by_its_kind(model):
    def chosen(layers, search):
        return layers

    strategy = functools.partial(chosen, [0, 1])
    selection = select_attention_layers(model, torch.randn(4, 3, 16, 16), num_removed_layers=2, strategy=strategy)
    assert (selection.strategy, selection.layers) == ("partial", [0, 1])


def outputs_without(model, images, layers):
    model = copy.deepcopy(model)
    model.remove_attention(layers)
    with torch.no_grad():
        return model(images).logits.double()


def test_divergence_is_greedy_by_the_mean_kl_divergence_from_the_whole_model(model, images):
    whole = outputs_without(model, images, []).log_softmax(-1)
    measured, order = [], []
    for _ in range(3):
        values = {}
        for layer in set(range(6)) - set(order):
            masked = outputs_without(model, images, [*order, layer]).log_softmax(-1)
            same = (whole.argmax(-1) == masked.argmax(-1)).double().mean().item()
            values[layer] = ((whole.exp() * (whole - masked)).sum(-1).mean().item(), same)
        order.append(min(values, key=lambda layer: values[layer][0]))
        measured.append(values[order[-1]])

    def nested(search):
        changes = search.output_change([order[:1], order[:2], order])
        found = [(change.divergence, change.agreement) for change in changes]
        torch.testing.assert_close(torch.tensor(found), torch.tensor(measured), rtol=1e-3, atol=1e-6)
        return order

    select_attention_layers(model, images, num_removed_layers=3, strategy=nested, batch_size=7)
    selection = select_attention_layers(model, images, num_removed_layers=3, strategy="divergence", batch_size=7)
    assert selection.order == order


def test_divergence_of_a_model_without_head_is_the_cosine_distance_of_its_features(model, images):
    def measure(search):
        (change,) = search.output_change([[1, 4]])
        pair = copy.deepcopy(model)
        pair.remove_attention([1, 4])
        with torch.no_grad():
            whole, masked = (one.vit(images).last_hidden_state[:, 0].double() for one in (model, pair))
        expected = (1 - torch.cosine_similarity(whole, masked)).mean().item()
        assert (change.divergence, change.agreement) == (pytest.approx(expected, rel=1e-4), None)
        return [1]

    select_attention_layers(model, images, 1, strategy=measure, output="class_token", batch_size=7)


def test_attention_deviation_takes_the_maps_that_differ_least_between_images(model, images):
    model.set_attn_implementation("eager")
    with torch.no_grad():
        attentions = model(images, output_attentions=True).attentions
    deviation = [maps.double().std(dim=0, correction=0).mean().item() for maps in attentions]
    model.set_attn_implementation("sdpa")
    selection = select_attention_layers(model, images, 3, strategy="attention_deviation", batch_size=7)
    assert selection.order == sorted(range(6), key=deviation.__getitem__)[:3]
    assert model.config._attn_implementation == "sdpa"


def read_through_the_layers(model, images):
    """Class probabilities read before and after the attention of each layer, and in the end: `(batch, classes)`."""
    streams = []
    for layer in model.encoder_layers:
        layer.register_forward_pre_hook(lambda module, args: streams.append((args[0], module.mix_tokens(args[0]))))
    with torch.no_grad():
        whole = model(images).logits
        read = [[model.classifier(model.vit.layernorm(one)[:, 0]) for one in pair] for pair in streams]
    for layer in model.encoder_layers:
        layer._forward_pre_hooks.clear()
    return whole.double().softmax(-1), [[one.double().softmax(-1) for one in pair] for pair in read]


def test_attention_benefit_is_what_attention_brings_the_answer_nearer_to_the_final_one(model, images):
    whole, read = read_through_the_layers(model, images)
    before, after = ([(whole * (whole / pair[k]).log()).sum(-1).mean().item() for pair in read] for k in (0, 1))
    benefit = [one - other for one, other in zip(before, after, strict=True)]
    scores = score_layers(layer_scores.attention_benefit, model, images)
    torch.testing.assert_close(torch.tensor(scores), torch.tensor(benefit), rtol=1e-3, atol=1e-6)
    selection = select_attention_layers(model, images, 3, strategy="attention_benefit", batch_size=7)
    assert selection.order == sorted(range(6), key=benefit.__getitem__)[:3]


@pytest.mark.parametrize("mask", ["skip", "identity"])
def test_lambda_sensitivity_is_the_fisher_information_of_lambda(model, images, mask):
    model.config.fade_to = mask
    values = torch.ones(6, requires_grad=True)
    buffers = {f"vit.layers.{index}.attention_lambda": value for index, value in enumerate(values)}
    for layer in model.encoder_layers:  # the general form, which has a gradient
        layer._weigh_by_lambda = functools.partial(weigh_by_any_lambda, layer, mask)
    information = torch.zeros(6, dtype=torch.float64)
    for image in images[:8]:
        log_p = torch.func.functional_call(model, buffers, (image[None],)).logits[0].log_softmax(-1)
        for one in log_p:
            (slope,) = torch.autograd.grad(one, values, retain_graph=True)
            information += one.exp().item() * slope.double().square() / 8
    for layer in model.encoder_layers:
        del layer._weigh_by_lambda
    scores = score_layers(layer_scores.lambda_sensitivity, model, images[:8], mask=mask)
    torch.testing.assert_close(torch.tensor(scores, dtype=torch.float64), information, rtol=0.25, atol=1e-6)
    selection = select_attention_layers(model, images[:8], 3, strategy="lambda_sensitivity", mask=mask)
    assert selection.order == sorted(range(6), key=scores.__getitem__)[:3]


def weigh_by_any_lambda(layer, fade_to, hidden_states, branch, state):
    rest = 0 if fade_to == "skip" else 1 - layer.attention_lambda
    return hidden_states + rest * hidden_states + layer.attention_lambda * branch


def test_weight_entropy_is_that_of_the_histogram_of_the_attention_matrices(model, images):
    with torch.no_grad():
        model.encoder_layers[2].attention.q_proj.weight.fill_(0.0)  # all in one interval
    numbers = []
    for layer in model.encoder_layers:
        attention = layer.attention
        parts = [attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj]
        numbers.append(np.concatenate([part.weight.detach().numpy().ravel() for part in parts]))
    edges = np.linspace(min(map(np.min, numbers)), max(map(np.max, numbers)), 257)
    shares = [np.histogram(one, edges)[0] / one.size for one in numbers]
    expected = [-sum(share * np.log(share) for share in of_layer if share) for of_layer in shares]
    scores = score_layers(layer_scores.weight_entropy, model, images)
    np.testing.assert_allclose(scores, expected, rtol=2e-3)
    assert select_attention_layers(model, images, 1, strategy="weight_entropy").layers == [2]


def score_layers(score, model, images, **options):
    scores = []

    def keep(search):
        scores.extend(score(search))
        return search.candidates[: search.num_layers]

    select_attention_layers(model, images, 1, strategy=keep, batch_size=7, **options)
    return scores


@pytest.mark.parametrize("strategy", ["attention_benefit", "lambda_sensitivity", "weight_entropy", "cosine"])
def test_rules_leave_layers_without_attention_alone_and_take_features(model, images, strategy):
    model.remove_attention([1, 4])
    selection = select_attention_layers(model, images, 2, strategy=strategy, output="class_token")
    assert set(selection.layers) <= {0, 2, 3, 5}
