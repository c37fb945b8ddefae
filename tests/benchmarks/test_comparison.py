"""What layers cost and what predicts it: accuracy of masked models, rank correlation, random sets."""

import copy

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from scipy.stats import spearmanr

from benchmarks.base_model import OPEN_CHOICES, BaseModel, correlations, draw_sets, masked_top1, rank_correlation
from benchmarks.more_strategies import _with_sum
from benchmarks.whole_blocks import choose_blocks, count_equal_blocks, without_blocks
from lambda_vit_hf import LambdaViTForImageClassification
from lambda_vit_hf.evaluation.accounting import count_macs
from tests.numpy_vit import masked_output


@pytest.fixture
def items():
    images = torch.randn(30, 3, 16, 16, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    labels = torch.randint(5, (30,), generator=torch.Generator().manual_seed(3))
    return [{"pixel_values": image, "labels": int(label)} for image, label in zip(images, labels, strict=True)]


@pytest.mark.parametrize("mask", ["skip", "identity"])
def test_masked_accuracy_is_that_of_the_masked_model(model, items, mask):
    model = model.double()
    items[3]["labels"] = -100  # could not be read: left out
    images = torch.stack([item["pixel_values"] for item in items])
    labels = np.array([item["labels"] for item in items])
    sets = [[], [0], [2, 4], [4, 2], [0, 1, 2, 3, 4]]
    expected = [
        (masked_output(model, images, masked, mask, "class_head").argmax(axis=1) == labels)[labels >= 0].mean()
        for masked in sets
    ]
    assert masked_top1(model, items, sets, mask, batch_size=7) == pytest.approx(expected)
    assert len(set(expected)) > 1, "nothing to tell apart"


def test_doubling_is_what_removal_does(model, items):
    model = model.double()
    (masked,) = masked_top1(model, items, [[1, 3]], "identity")
    model.remove_attention([1, 3])
    assert masked_top1(model, items, [[]])[0] == masked


def test_rank_correlation_is_spearmans_with_ties():
    generator = np.random.default_rng(0)
    first, second = generator.integers(0, 5, 40), generator.integers(0, 5, 40)
    assert rank_correlation(first, second) == pytest.approx(spearmanr(first, second).statistic)
    assert rank_correlation([1, 2, 3], [10, 20, 1000]) == pytest.approx(1)
    assert rank_correlation([1, 2, 3], [0, 0, 0]) is None


def test_a_model_with_a_new_head_is_refused(model, items, tmp_path):
    model.base_model.save_pretrained(tmp_path)
    model = LambdaViTForImageClassification.from_pretrained(tmp_path, num_labels=5)
    with pytest.raises(ValueError, match="newly initialized"):
        BaseModel(model, torch.stack([item["pixel_values"] for item in items]), items, seed=0)


def test_random_sets_are_distinct_and_repeatable():
    sets = draw_sets([0, 2, 3, 5], 2, 6, seed=0)
    assert len({tuple(one) for one in sets}) == 6
    assert all(one == sorted(set(one)) and set(one) <= {0, 2, 3, 5} and len(one) == 2 for one in sets)
    assert draw_sets([0, 2, 3, 5], 2, 3, seed=1) == draw_sets([0, 2, 3, 5], 2, 3, seed=1)
    with pytest.raises(ValueError, match="no 7 different sets of 2 of 4"):
        draw_sets([0, 2, 3, 5], 2, 7, seed=0)


def test_a_base_model_measures_strategies_choices_and_random_sets(model, items):
    base = BaseModel(model.double(), torch.stack([item["pixel_values"] for item in items]), items, seed=0)
    runs = base.compare_strategies(["nose", "last"], [1, 2])
    assert [(run["num_removed"], run["strategy"]) for run in runs] == [
        (1, "nose"),
        (1, "last"),
        (2, "nose"),
        (2, "last"),
    ]
    assert runs[3]["layers"] == [4, 5]
    assert runs[3]["top1_skip"] == masked_top1(model, items, [[4, 5]])[0]
    assert runs[3]["transfer_entropy"] == pytest.approx(base.select("last", 2).transfer_entropy)
    choices = base.compare_choices([1, 2])
    by_default = {"output": "class_head", "mask": "identity", "compare": "magnitude"}
    same = [run for run in choices if by_default.items() <= run.items()]
    assert [run["layers"] for run in same] == [run["layers"] for run in runs if run["strategy"] == "nose"]
    assert same[1]["transfer_entropy"] == pytest.approx(runs[2]["transfer_entropy"])
    measured = base.measure_random_sets(2, 10)
    assert len(measured["correlations"]) == len(OPEN_CHOICES) == 12
    values = [abs(value) for value in measured["transfer_entropy"]["class_head, identity"]]
    expected = spearmanr(values, measured["top1_loss"]["skip"]).statistic
    assert measured["correlations"][0]["with_loss_skip"] == pytest.approx(expected)


def test_correlations_are_told_with_and_without_the_layer_that_decides_alone():
    sets = [[0, 1], [0, 2], [0, 3], [1, 2], [1, 3], [2, 3]]
    loss = [0.8, 0.7, 0.9, 0.03, 0.02, 0.01]  # layer 0 ruins the model
    values = [-9.0, -8.0, -7.0, 0.1, 0.2, 0.3]  # the rest is ranked the wrong way round
    rows = correlations(sets, {"skip": loss, "identity": loss}, dict.fromkeys(
        (f"{choice['output']}, {choice['mask']}" for choice in OPEN_CHOICES), values))  # fmt: skip
    magnitude, value = rows[0], rows[1]
    assert (magnitude["worst_skip"], magnitude["sets_without_worst_skip"]) == (0, 3)
    assert magnitude["with_loss_skip"] == pytest.approx(spearmanr(np.abs(values), loss).statistic)
    assert value["with_loss_skip"] == pytest.approx(spearmanr(values, loss).statistic)
    assert magnitude["with_loss_skip_without_worst"] == pytest.approx(-1)


def select_by_labels(rule, model, items, mask="skip"):
    images = torch.stack([item["pixel_values"] for item in items])
    labels = torch.tensor([item["labels"] for item in items])
    return BaseModel(model, images, items, seed=0, labels=labels).compare_strategies([rule], [2], [mask])


def test_a_mask_that_does_not_exist_is_refused(model, items):
    with pytest.raises(ValueError, match="'nose:skp'"):
        select_by_labels("nose:skp", model, items)


def without(model, layers, mask):
    model = copy.deepcopy(model)
    model.set_fade_to(mask)
    model.remove_attention(layers)
    return model


@pytest.mark.parametrize("mask", ["skip", "identity"])
def test_the_loss_chooses_greedily_by_the_cross_entropy_of_the_labels(model, items, mask):
    model = model.double()
    images, labels = torch.stack([item["pixel_values"] for item in items]), [item["labels"] for item in items]
    order = []
    for _ in range(2):
        losses = {}
        for layer in set(range(6)) - set(order):
            with torch.no_grad():
                log_p = without(model, [*order, layer], mask)(images).logits.log_softmax(-1)
            losses[layer] = -sum(log_p[i, label].item() for i, label in enumerate(labels))
        order.append(min(losses, key=losses.get))
    (run,) = select_by_labels("loss", model, items, mask)
    assert run["order"] == order
    with torch.no_grad():
        whole, masked = (one(images).logits.softmax(-1) for one in (model, without(model, run["layers"], mask)))
    assert run["divergence"] == pytest.approx((whole * (whole / masked).log()).sum(-1).mean().item())


@pytest.mark.parametrize("mask", ["skip", "identity"])
def test_the_gradient_of_the_loss_is_that_by_lambda(model, items, mask):
    model = model.double()
    model.set_fade_to(mask)
    images, labels = torch.stack([item["pixel_values"] for item in items]), [item["labels"] for item in items]

    def loss(layer, value):
        model.encoder_layers[layer].set_attention_lambda(value)
        with torch.no_grad():
            total = torch.nn.functional.cross_entropy(model(images).logits, torch.tensor(labels)).item()
        model.encoder_layers[layer].set_attention_lambda(1.0)
        return total

    slopes = [abs(loss(layer, 1.0) - loss(layer, 1 - 1e-4)) for layer in range(6)]
    (run,) = select_by_labels("loss_gradient", model, items, mask)
    assert run["order"] == sorted(range(6), key=slopes.__getitem__)[:2]


@pytest.mark.parametrize("mask", ["skip", "identity"])
def test_learned_lambdas_minimise_the_divergence_at_their_sum(model, items, mask):
    model = model.double()
    model.set_fade_to(mask)
    images = torch.stack([item["pixel_values"] for item in items])
    with torch.no_grad():
        whole = model(images).logits.log_softmax(-1)

    def divergence(lambdas):
        for layer, value in enumerate(lambdas):
            model.encoder_layers[layer].set_attention_lambda(float(value))
        with torch.no_grad():
            masked = model(images).logits.log_softmax(-1)
        model.set_attention_lambda(1.0, range(6))
        return (whole.exp() * (whole - masked)).sum(-1).mean().item()

    kept = {"type": "eq", "fun": lambda lambdas: lambdas.sum() - 4}
    found = minimize(divergence, np.full(6, 4 / 6), bounds=[(0, 1)] * 6, constraints=kept, options={"ftol": 1e-12})
    assert found.success
    (run,) = select_by_labels("learned_lambdas", model, items, mask)
    assert set(run["layers"]) == set(np.argsort(found.x)[:2])


def test_lambdas_of_a_sum_are_the_nearest_ones():
    values = torch.tensor([0.9, 0.8, -0.3, 1.4, 0.2])
    found = _with_sum(values, 3.0)
    assert found.sum().item() == pytest.approx(3.0) and found.min() >= 0 and found.max() <= 1
    inside = (found > 0) & (found < 1)
    moved = (found - values)[inside]
    torch.testing.assert_close(moved, moved[:1].expand_as(moved))


def test_a_model_without_blocks_is_one_that_never_had_them(model, pixel_values):
    smaller = without_blocks(model, [1, 4])
    hidden_states, extra = model.embed(pixel_values)
    for index, layer in enumerate(model.encoder_layers):
        if index not in (1, 4):
            hidden_states = layer.feed_forward(layer.mix_tokens(hidden_states, **extra))
    torch.testing.assert_close(smaller(pixel_values).logits, model.read_out(hidden_states, "class_head"))
    assert smaller.config.num_hidden_layers == 4 and model.config.num_hidden_layers == 6
    model.remove_attention([0])
    with pytest.raises(ValueError, match="have lost"):
        without_blocks(model, [1])


def test_as_many_blocks_as_save_the_same(model):
    attention, block = (count_macs(model.config) - count_macs(one.config) for one in (
        without(model, [0, 1, 2, 3], "skip"), without_blocks(model, [0])))  # fmt: skip
    assert count_equal_blocks(model, 4) == round(attention / block) > 0
    assert count_equal_blocks(model, 1) == 1, "never none"


def test_blocks_are_chosen_by_what_the_output_changes(model, items):
    images = torch.stack([item["pixel_values"] for item in items]).float()
    with torch.no_grad():
        whole = model(images).logits.double().softmax(-1)
        changes = []
        for block in range(6):
            masked = without_blocks(model, [block])(images).logits.double().softmax(-1)
            changes.append((whole * (whole / masked).log()).sum(-1).mean().item())
    assert choose_blocks(model, images, 1, batch_size=7) == [changes.index(min(changes))]
    assert len(choose_blocks(model, images, 2)) == 2
