"""Resamples of calibration images: drawn as they should be, and worth what a search on those images would give."""

import numpy as np
import pytest
import torch

from lambda_vit_hf.selection.entropy import GaussianEntropy
from lambda_vit_hf.selection.stability import draw_folds, resampled_transfer_entropy, share_picked


def test_as_many_folds_are_drawn_as_have_images_and_no_others():
    counts = torch.tensor([3.0, 0.0, 2.0, 2.0, 0.0])
    weights = draw_folds(counts, num_resamples=2000)
    assert weights.shape == (2000, 5)
    assert torch.equal(weights.sum(dim=1), torch.full((2000,), 3.0, dtype=torch.float64))
    assert weights[:, [1, 4]].sum() == 0
    assert weights.mean(dim=0)[[0, 2, 3]].tolist() == pytest.approx([1, 1, 1], abs=0.06)
    assert torch.equal(weights, draw_folds(counts, num_resamples=2000)), "another draw each time"


@pytest.mark.parametrize("counts", [[0.0, 4.0, 0.0], [0.0, 0.0, 0.0]])
def test_where_nothing_can_vary_nothing_is_drawn(counts):
    assert draw_folds(torch.tensor(counts)) is None


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
