"""How sure a pick is: the same choice on resamples of the calibration images, without another forward pass.

The moments of each fold of the images are known (see [`GaussianEntropy`]). A resample draws as many folds as there
are, with replacement (a bootstrap of blocks of images), merges their moments, and picks again.
"""

from collections.abc import Sequence

import torch

from .entropy import GaussianEntropy


NUM_RESAMPLES = 500


def draw_folds(counts: torch.Tensor, num_resamples: int = NUM_RESAMPLES, seed: int = 0) -> torch.Tensor | None:
    """
    How often each fold counts in each resample, `(resamples, folds)`; folds without images are never drawn.

    Args:
        counts (`torch.Tensor` of shape `(folds,)`): samples in each fold.
        num_resamples (`int`, *optional*, defaults to `NUM_RESAMPLES`): how many.
        seed (`int`, *optional*, defaults to 0): of the draws.

    Returns:
        `torch.Tensor`, or `None` if fewer than two folds have images: nothing can vary then.
    """
    filled = counts.cpu().nonzero().flatten()
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
