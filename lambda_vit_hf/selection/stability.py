"""How sure a pick is: the same choice on resamples of the calibration images, without another forward pass.

The moments of each fold of the images are known (see [`GaussianEntropy`]). A resample draws as many folds as there
are, with replacement (a bootstrap of blocks of images), merges their moments, and picks again.
"""

from collections.abc import Sequence

import torch

from .entropy import GaussianEntropy


NUM_RESAMPLES = 500
STANDARD_ERRORS = 2.5
NEAR = 2.0
RARE = 0.05


def draw_folds(
    counts: torch.Tensor, folds: Sequence[int], num_resamples: int = NUM_RESAMPLES, seed: int = 0
) -> torch.Tensor | None:
    """
    How often each fold counts in each resample, `(resamples, folds)`; folds without images are never drawn.

    Args:
        counts (`torch.Tensor` of shape `(folds,)`): samples in each fold.
        folds (`Sequence[int]`): which to draw from.
        num_resamples (`int`, *optional*, defaults to `NUM_RESAMPLES`): how many.
        seed (`int`, *optional*, defaults to 0): of the draws.

    Returns:
        `torch.Tensor`, or `None` if fewer than two folds have images: nothing can vary then.
    """
    filled = torch.tensor([fold for fold in folds if counts[fold] > 0])
    if len(filled) < 2:
        return None
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(filled), (num_resamples, len(filled)), generator=generator)
    weights = torch.zeros(num_resamples, len(counts), dtype=torch.float64)
    return weights.scatter_add_(1, filled[drawn], torch.ones_like(drawn, dtype=torch.float64))


def resampled_transfer_entropy(
    unmasked: GaussianEntropy, masked: Sequence[GaussianEntropy], weights: torch.Tensor
) -> torch.Tensor:
    """Transfer entropy (nats) of each set in each resample, `(resamples, sets)`."""
    whole = unmasked.values(weights)
    return torch.stack([whole - one.values(weights) for one in masked], dim=1).cpu()


def share_picked(transfer_entropy: torch.Tensor, picked: int, by_magnitude: bool) -> float:
    """
    Share of resamples, in [0, 1], in which the set at position `picked` has the least transfer entropy.

    Args:
        transfer_entropy (`torch.Tensor` of shape `(resamples, sets)`): in nats.
        picked (`int`): position of the set that all images together pick.
        by_magnitude (`bool`): compare by magnitude, else by value.
    """
    compared = transfer_entropy.abs() if by_magnitude else transfer_entropy
    return (compared.argmin(dim=1) == picked).double().mean().item()


def may_be_least(
    measured: torch.Tensor, resampled: torch.Tensor, by_magnitude: bool, num_folds: int, share: float
) -> torch.Tensor:
    """
    Which sets may have the least transfer entropy over all images, judged by a share of them.

    A set is out if it is more than `STANDARD_ERRORS` behind the best, of what the other images can still change in
    their difference; or if it is so uncertain that it is not out by this, but comes within `NEAR` standard errors of
    the best only by a rare accident, with a probability below `RARE`. The limits are rules of thumb: no choice depends
    on them, only its cost.

    Args:
        measured (`torch.Tensor` of shape `(sets,)`): in nats, over the images that were looked at.
        resampled (`torch.Tensor` of shape `(resamples, sets)`): over resamples of these images.
        by_magnitude (`bool`): compare by magnitude, else by value.
        num_folds (`int`): how many folds the resamples are drawn from, at least 2.
        share (`float`): of all images, in (0, 1).

    Returns:
        `torch.Tensor` of shape `(sets,)`, boolean; true for the best so far.
    """
    # Resamples of n folds vary too little, by (n - 1) / n. What is known of a share of the images will not change.
    widening = num_folds / (num_folds - 1) * (1 - share)
    errors = (resampled.var(dim=0) * widening).sqrt()
    compared, compared_resamples = (measured.abs(), resampled.abs()) if by_magnitude else (measured, resampled)
    best = int(compared.argmin())
    error_of_difference = ((compared_resamples - compared_resamples[:, [best]]).var(dim=0) * widening).sqrt()
    # The error itself is known from few folds: Student's t in place of the normal distribution, to the first order.
    limit = STANDARD_ERRORS + (STANDARD_ERRORS**3 + STANDARD_ERRORS) / (4 * (num_folds - 1))
    is_near = compared - compared[best] <= limit * error_of_difference
    within = compared[best] + NEAR * errors[best]
    normal = torch.distributions.Normal(measured, errors.clamp(min=torch.finfo(errors.dtype).tiny))
    probability = normal.cdf(within) - (normal.cdf(-within) if by_magnitude else 0.0)
    may_be = is_near & (probability >= RARE)
    may_be[best] = True
    return may_be
