"""Resamples of calibration images: drawn as they should be, and worth what a search on those images would give."""

import numpy as np
import pytest
import torch

from lambda_vit_hf.selection.entropy import GaussianEntropy
from lambda_vit_hf.selection.stability import draw_folds, may_be_least, resampled_transfer_entropy, share_picked


def test_as_many_folds_are_drawn_as_have_images_and_no_others():
    counts = torch.tensor([3.0, 0.0, 2.0, 2.0, 5.0])
    weights = draw_folds(counts, range(4), num_resamples=2000)
    assert weights.shape == (2000, 5)
    assert torch.equal(weights.sum(dim=1), torch.full((2000,), 3.0, dtype=torch.float64))
    assert weights[:, [1, 4]].sum() == 0
    assert weights.mean(dim=0)[[0, 2, 3]].tolist() == pytest.approx([1, 1, 1], abs=0.06)
    assert torch.equal(weights, draw_folds(counts, range(4), num_resamples=2000)), "another draw each time"


@pytest.mark.parametrize("counts", [[0.0, 4.0, 0.0], [0.0, 0.0, 0.0]])
def test_where_nothing_can_vary_nothing_is_drawn(counts):
    assert draw_folds(torch.tensor(counts), range(3)) is None


def test_a_resample_has_the_entropy_of_its_images():
    features = torch.randn(30, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 100
    masked = features * torch.tensor([1.0, 2.0, 0.5, 3.0]) + features.roll(1, 0) / 2
    folds = torch.arange(30) % 5
    estimates = [GaussianEntropy(5), GaussianEntropy(5)]
    for part in (slice(0, 13), slice(13, 30)):
        estimates[0].update(features[part], folds[part])
        estimates[1].update(masked[part], folds[part])
    weights = torch.tensor([[1, 1, 1, 1, 1], [2, 0, 3, 0, 0]])
    found = resampled_transfer_entropy(estimates[0], estimates[1:], weights)
    for row, drawn in enumerate(([0, 1, 2, 3, 4], [0, 0, 2, 2, 2])):
        whole, part = (
            np.log(np.concatenate([one[fold::5].numpy() for fold in drawn]).std(axis=0)).sum()
            for one in (features, masked)
        )
        assert found[row, 0].item() == pytest.approx(whole - part, rel=1e-9)


def test_picks_are_compared_by_magnitude_or_value():
    values = torch.tensor([[0.1, -0.2], [0.3, -0.1], [0.1, 0.2], [0.2, -0.1]])
    assert share_picked(values, 0, by_magnitude=True) == 0.5
    assert share_picked(values, 0, by_magnitude=False) == 0.25
    assert share_picked(values, 1, by_magnitude=False) == 0.75


def spread(means: list[float], errors: list[float], num_folds: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Sets measured at `means`, and resamples of `num_folds` folds that say that they are known to `errors`."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(5000, len(means), generator=generator, dtype=torch.float64)
    measured = torch.tensor(means, dtype=torch.float64)
    narrow = (1 - 1 / num_folds) ** 0.5
    return measured, measured + narrow * noise * torch.tensor(errors, dtype=torch.float64)


@pytest.mark.parametrize(
    ("means", "errors", "expected"),
    [
        ([0.0, 0.1, 9.0], [0.05, 0.05, 0.05], [True, True, False]),
        ([0.1, -0.1, 0.3], [0.01, 0.01, 0.01], [True, True, False]),
        ([3.0, 1.0, 1.4], [0.2, 0.2, 0.2], [False, True, True]),
        ([1e-6, 0.02, 0.02], [1e-7, 0.02, 1e-9], [True, False, False]),  # nearer than 1e-6 by a rare accident only
        ([0.0, 0.5, 1.0], [0.0, 0.0, 0.0], [True, False, False]),
    ],
)
def test_what_may_be_least_by_magnitude(means, errors, expected):
    measured, resampled = spread(means, errors, num_folds=4)
    assert may_be_least(measured, resampled, True, 4, share=1e-9).tolist() == expected


def test_what_may_be_least_by_value():
    measured, resampled = spread([-1.0, -0.9, 0.0], [0.1, 0.1, 0.1], num_folds=4)
    assert may_be_least(measured, resampled, False, 4, share=1e-9).tolist() == [True, True, False]
    assert may_be_least(measured, resampled, True, 4, share=1e-9).tolist() == [False, False, True]


def test_the_more_images_are_known_the_less_can_change():
    # 1.7 of the standard errors of the difference apart.
    measured, resampled = spread([0.0, 0.24], [0.1, 0.1], num_folds=8)
    assert may_be_least(measured, resampled, False, 8, share=0.1).tolist() == [True, True]
    assert may_be_least(measured, resampled, False, 8, share=0.9).tolist() == [True, False]
