"""What each number of removed layers changes and saves, and which number keeps within bounds."""

import copy
import json

import numpy as np
import PIL.Image
import pytest
import torch
from accelerate import PartialState

from lambda_vit_hf import LambdaViTModel, SelectionConfig, select_attention_layers
from lambda_vit_hf.evaluation.accounting import count_macs, count_parameters
from lambda_vit_hf.evaluation.plotting import plot_removal_curve
from lambda_vit_hf.evaluation.removal_curve import CurvePoint, RemovalCurve, removal_curve
from lambda_vit_hf.selection.calibration_passes import CalibrationPasses
from lambda_vit_hf.selection.result import AttentionSelection
from tests.conftest import in_two_processes


IMAGES = torch.randn(40, 3, 16, 16, generator=torch.Generator().manual_seed(3))


def log_probabilities(model):
    with torch.no_grad():
        return model(IMAGES).logits.double().log_softmax(-1)


@pytest.mark.parametrize("fade_to", ["identity", "skip"])
def test_each_point_is_the_model_without_these_layers(model, fade_to):
    model.set_fade_to(fade_to)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    config = SelectionConfig(calibration_size=None, batch_size=7)
    curve = removal_curve(model, IMAGES, config, disable_tqdm=True)
    assert curve.selection == select_attention_layers(model, IMAGES, 5, batch_size=7, disable_tqdm=True)
    whole = log_probabilities(model)
    for number, point in enumerate(curve.points):
        removed = copy.deepcopy(model)
        removed.remove_attention(point.layers)
        masked = log_probabilities(removed)
        assert point.layers == curve.selection.order[:number]
        assert point.divergence == pytest.approx((whole.exp() * (whole - masked)).sum(-1).mean().item(), abs=1e-6)
        assert point.agreement == (whole.argmax(-1) == masked.argmax(-1)).double().mean().item()
        assert point.parameters == count_parameters(removed) and point.macs == count_macs(removed.config)
        assert point.images_per_second is None
        if number:
            searched = select_attention_layers(model, IMAGES, number, batch_size=7, disable_tqdm=True)
            found = curve.selection_of(number)
            assert (found.order, found.steps) == (searched.order, searched.steps)
            assert point.transfer_entropy == found.transfer_entropy == pytest.approx(searched.transfer_entropy)
    assert [point.layers for point in curve.compared["last"]] == [[5, 4, 3, 2, 1][:number] for number in range(6)]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert json.loads(json.dumps(curve.to_dict()))["points"][2]["layers"] == curve.selection.order[:2]


def test_speed_is_that_of_the_model_without_the_layers_which_is_left_as_it_was(model):
    computed = []
    for layer in model.encoder_layers:
        layer.attention.register_forward_hook(lambda *_: computed.append(1))
    expected = log_probabilities(model)
    computed.clear()
    model.train()
    curve = removal_curve(
        model, IMAGES, SelectionConfig(strategy="last"), compare_with=[], pixel_values=IMAGES[:2], rounds=2,
        disable_tqdm=True,
    )  # fmt: skip
    assert all(point.images_per_second > 0 for point in curve.points)
    assert model.training and model.attention_lambdas == [1.0] * 6
    assert torch.equal(log_probabilities(model.eval()), expected)
    computed.clear()
    removal_curve(model, IMAGES[:1], SelectionConfig(strategy="last"), compare_with=[], disable_tqdm=True)
    without = len(computed)
    computed.clear()
    removal_curve(model, IMAGES[:1], SelectionConfig(strategy="last"), compare_with=[], pixel_values=IMAGES[:2],
                  rounds=2, disable_tqdm=True)  # fmt: skip
    assert len(computed) - without == (6 + 5 + 4 + 3 + 2 + 1) * 5, "2 rounds, and 3 to warm up"


def test_a_model_without_head_is_compared_by_its_features(model, tmp_path):
    model.save_pretrained(tmp_path)
    bare = LambdaViTModel.from_pretrained(tmp_path)
    curve = removal_curve(bare, IMAGES, compare_with=["first"], disable_tqdm=True)
    assert curve.points[0].divergence == pytest.approx(0, abs=1e-9)
    assert 0 < curve.points[3].divergence < 2 and curve.points[3].agreement is None
    with pytest.raises(ValueError, match="no agreement"):
        curve.choose(min_agreement=0.9)
    assert curve.choose(max_divergence=2.0) == 5


def test_sets_that_do_not_hold_each_other_are_refused(model):
    with pytest.raises(ValueError, match="exhaustive"):
        removal_curve(model, IMAGES, SelectionConfig(strategy="exhaustive"))


def curve_of(divergences, agreements):
    points = [
        CurvePoint(list(range(k)), 0.0, *pair, kind="features" if pair[1] is None else "single_label_classification")
        for k, pair in enumerate(zip(divergences, agreements, strict=True))
    ]
    return RemovalCurve(points, AttentionSelection([0, 1, 2]))


@pytest.mark.parametrize(
    ("bounds", "number"),
    [
        ({"max_divergence": 0.2}, 1),  # the third is within it again, but the second is not
        ({"max_divergence": 0.1}, 1),
        ({"max_divergence": 0.05}, 0),
        ({"max_divergence": 9.0}, 3),
        ({"min_agreement": 0.8}, 2),
        ({"min_agreement": 0.0}, 3),
        ({"min_agreement": 1.0}, 0),
        ({"min_agreement": 0.8, "max_divergence": 0.2}, 1),
    ],
)
def test_as_many_layers_as_keep_within_all_bounds(bounds, number):
    assert curve_of([0.0, 0.1, 0.3, 0.2], [1.0, 0.9, 0.8, 0.5]).choose(**bounds) == number


@pytest.mark.parametrize(
    "wrong", [{}, {"max_divergence": -0.1}, {"max_divergence": float("nan")}, {"min_agreement": 1.1}]
)
def test_bounds_that_cannot_be_are_refused(wrong):
    with pytest.raises(ValueError, match=r"max_divergence|min_agreement"):
        curve_of([0.0, 0.1], [1.0, 0.9]).choose(**wrong)


def points_of(folder: str, rank: int) -> list:
    PartialState(cpu=True)
    model = LambdaViTModel.from_pretrained(folder)
    curve = removal_curve(model, IMAGES, SelectionConfig(batch_size=7), pixel_values=IMAGES[:1], disable_tqdm=True)
    return [[point.divergence for point in curve.points], curve.points[0].images_per_second is not None]


def test_two_processes_find_what_one_does(model, tmp_path):
    model.save_pretrained(tmp_path)
    (first, timed), (second, timed_too) = in_two_processes(points_of, str(tmp_path))
    assert first == second and timed and not timed_too
    np.testing.assert_allclose(first, points_of(str(tmp_path), 0)[0], atol=1e-12)


def test_the_picture_is_drawn_with_and_without_speeds(model, tmp_path):
    curve = removal_curve(model, IMAGES[:8], compare_with=["first"], pixel_values=IMAGES[:1], disable_tqdm=True)
    plot_removal_curve(curve, tmp_path / "a.png", chosen=2)
    plot_removal_curve(curve_of_model_without_speeds(curve), tmp_path / "b.png")
    for name in ("a.png", "b.png"):
        PIL.Image.open(tmp_path / name).verify()


def curve_of_model_without_speeds(curve):
    points = [copy.copy(point) for point in curve.points]
    for point in points:
        object.__setattr__(point, "images_per_second", None)
    return RemovalCurve(points, curve.selection)


def test_entropy_and_divergence_of_a_set_take_one_pass(model, monkeypatch):
    passes = []
    for_each_batch = CalibrationPasses.for_each_batch
    monkeypatch.setattr(
        CalibrationPasses, "for_each_batch", lambda self, *how: (passes.append(how[1]), for_each_batch(self, *how))[1]
    )
    removal_curve(model, IMAGES[:8], SelectionConfig(strategy="last"), compare_with=["first"], disable_tqdm=True)
    assert passes == [
        "layer entropies",
        "transfer entropy of 11 sets",
    ]
