import math

import numpy as np
import pytest
import torch

from lambda_vit_hf.selection.entropy import GaussianEntropy


def entropy_of(batches) -> GaussianEntropy:
    estimate = GaussianEntropy()
    for batch in batches:
        estimate.update(batch)
    return estimate


@pytest.mark.parametrize("batch_size", [1, 7, 64, 300])
def test_any_batch_size_gives_the_entropy_of_the_whole_set(batch_size):
    features = torch.randn(300, 4, 9, generator=torch.Generator().manual_seed(0)) * torch.arange(1, 10) + 1e3
    expected = np.log(features.double().numpy().reshape(-1, 9).std(axis=0)).sum()
    assert entropy_of(features.split(batch_size)).value() == pytest.approx(expected, rel=1e-12)


def test_order_does_not_matter():
    features = torch.randn(100, 5, generator=torch.Generator().manual_seed(0))
    turned = entropy_of(features.flip(0).split(9))
    assert entropy_of(features.split(7)).value() == pytest.approx(turned.value(), rel=1e-12)


def test_gaussians_of_known_sigma_have_the_known_entropy():
    sigma = torch.tensor([0.5, 1.0, 3.0], dtype=torch.float64)
    features = torch.randn(200_000, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * sigma
    assert entropy_of(features.split(10_000)).value() == pytest.approx(sigma.log().sum().item(), abs=0.01)


def test_the_error_falls_with_the_number_of_samples():
    sigma = torch.tensor([0.5, 1.0, 3.0, 0.1], dtype=torch.float64)
    features = torch.randn(400_000, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * sigma
    for count in (400, 4_000, 40_000, 400_000):
        error = abs(entropy_of([features[:count]]).value() - sigma.log().sum().item())
        assert error < 3 * math.sqrt(4 / (2 * count)), f"{count} samples"  # three standard errors


def test_folds_are_kept_apart_and_add_up_to_the_whole():
    features = torch.randn(50, 3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64) - 50
    folds = torch.arange(50) % 4
    estimate = GaussianEntropy(num_folds=4)
    for part in (slice(0, 7), slice(7, 8), slice(8, 50)):
        estimate.update(features[part], folds[part])
    assert estimate.count == 150
    expected = np.log(features.numpy().reshape(-1, 4).std(axis=0)).sum()
    assert estimate.value() == pytest.approx(expected, rel=1e-12)
    for fold in range(4):
        weights = torch.nn.functional.one_hot(torch.tensor([fold]), 4)
        expected = np.log(features[fold::4].numpy().reshape(-1, 4).std(axis=0)).sum()
        assert estimate.values(weights).item() == pytest.approx(expected, rel=1e-12)


def test_estimates_of_disjoint_images_merge_to_that_of_all():
    features = torch.randn(60, 4, generator=torch.Generator().manual_seed(0)) * 5 + 100
    merged = entropy_of([features[:1]])
    for part in (features[1:20], features[20:]):
        merged.merge(entropy_of([part]))
    merged.merge(GaussianEntropy())
    assert merged.value() == pytest.approx(entropy_of([features]).value(), rel=1e-12)


def test_float32_features_far_from_zero_lose_nothing_to_cancellation():
    features = torch.randn(10_000, 1, generator=torch.Generator().manual_seed(0)) * 0.25 + 4096.0
    expected = math.log(features.double().std(unbiased=False).item())
    assert entropy_of(features.split(100)).value() == pytest.approx(expected, rel=1e-9)


def test_a_constant_channel_is_counted_and_stays_finite():
    estimate = entropy_of([torch.tensor([[1.0, 5.0], [2.0, 5.0], [3.0, 5.0]])])
    assert estimate.dead_channels() == 1
    # What is stored as `output_entropy` of a model with dead channels is in these units.
    assert estimate.value() == pytest.approx(math.log(math.sqrt(2 / 3)) + math.log(1e-8))


@pytest.mark.parametrize("sigma", [1e-7, 1e-3, 0.5])
def test_a_channel_that_hardly_changes_counts_with_its_own_sigma(sigma):
    estimate = entropy_of([sigma * torch.tensor([[-1.0], [1.0]], dtype=torch.float64)])
    assert estimate.value() == pytest.approx(math.log(sigma), rel=1e-9)
    assert estimate.dead_channels() == 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_features_that_are_not_finite_are_refused(bad):
    with pytest.raises(ValueError, match="NaN or infinite"):
        GaussianEntropy().update(torch.tensor([[1.0, bad]]))


def test_nothing_added_is_an_error():
    with pytest.raises(ValueError, match="empty"):
        GaussianEntropy().value()
