"""Entropy of features by a Gaussian proxy, channel by channel, over any number of batches.

    H(F) = sum over channels j of log sigma_j          (nats)

with sigma_j the standard deviation of channel j over all images and tokens. The constant D/2 * log(2*pi*e) of a
Gaussian is dropped, as in the paper (Lin et al., CVPR 2024, section 3.1, equation 3): only differences are used.
"""

import torch

from .processes import gather, rank_and_num_processes


# A channel that never changes carries no information: log(0) would drown every other channel, so sigma stops here.
SMALLEST_SIGMA = 1e-8


class GaussianEntropy:
    """
    Streaming estimate of H(F): count, mean and sum of squared deviations per channel, in float64.

    Memory does not depend on the number of images. Batches and estimates merge exactly, up to rounding, by the
    formula of Chan, Golub and LeVeque (1979), so neither batch size nor order matters.

    Args:
        num_folds (`int`, *optional*, defaults to 1):
            Keep the moments of this many disjoint parts of the images apart, to see how much H depends on which
            images there were. H of all of them is the same.

    Example:

    ```python
    >>> import torch
    >>> from lambda_vit_hf.selection.entropy import GaussianEntropy

    >>> estimate = GaussianEntropy()
    >>> for batch in torch.randn(1000, 32, 5).mul(2.0):  # sigma = 2 in each of 5 channels
    ...     estimate.update(batch)
    >>> round(estimate.value(), 1)  # 5 * log(2)
    3.5
    ```
    """

    def __init__(self, num_folds: int = 1):
        self.num_folds = num_folds
        self.counts: torch.Tensor | None = None  # (folds,)
        self.means: torch.Tensor | None = None  # (folds, channels)
        self.squared_deviations: torch.Tensor | None = None  # (folds, channels), each from its fold's mean

    @property
    def count(self) -> int:
        """Number of samples so far."""
        return 0 if self.counts is None else int(self.counts.sum().item())

    @torch.no_grad()
    def update(self, features: torch.Tensor, folds: torch.Tensor | None = None) -> None:
        """
        Add a batch.

        Args:
            features (`torch.Tensor` of shape `(..., channels)`): e.g. `(batch, tokens, hidden)` or `(batch, classes)`.
            folds (`torch.Tensor` of shape `(batch,)`, *optional*):
                Which fold each image belongs to, where there are several.

        Raises:
            ValueError: if a feature is NaN or infinite.
        """
        features = features.detach()
        per_image = features[0, ..., 0].numel() if len(features) else 1
        features = features.reshape(-1, features.shape[-1]).double()
        if not torch.isfinite(features).all():
            raise ValueError("Features are NaN or infinite: check the weights and the calibration images.")
        if not len(features):
            return
        member = features.new_zeros(len(features), self.num_folds)
        if folds is None or self.num_folds == 1:
            member[:, 0] = 1
        else:
            member.scatter_(1, folds.to(features.device).repeat_interleave(per_image)[:, None], 1)
        counts = member.sum(dim=0)
        means = (member.T @ features) / counts.clamp(min=1)[:, None]
        self._merge(counts, means, member.T @ (features - member @ means).square())

    def _merge(self, counts: torch.Tensor, means: torch.Tensor, squared_deviations: torch.Tensor) -> None:
        if self.counts is None:
            self.counts, self.means, self.squared_deviations = counts, means, squared_deviations
            return
        totals = self.counts + counts
        share = (counts / totals.clamp(min=1))[:, None]
        differences = means - self.means
        self.squared_deviations = (
            self.squared_deviations + squared_deviations + differences.square() * self.counts[:, None] * share
        )
        self.means = self.means + differences * share
        self.counts = totals

    def merge(self, other: "GaussianEntropy") -> None:
        """Add what another estimate of the same features has seen."""
        if other.counts is not None:
            self._merge(other.counts, other.means, other.squared_deviations)

    def sigma(self, weights: torch.Tensor | None = None) -> torch.Tensor:
        """
        Standard deviation of each channel (population, ddof 0), float64.

        Args:
            weights (`torch.Tensor` of shape `(resamples, folds)`, *optional*):
                How often each fold counts, in each of many resamples of the images.

        Returns:
            `torch.Tensor` of shape `(channels,)`, or `(resamples, channels)`.

        Raises:
            ValueError: if nothing was added.
        """
        if self.count == 0:
            raise ValueError("No features were added: the calibration set is empty.")
        center = (self.counts @ self.means) / self.counts.sum()
        means = self.means - center  # a sum of squares far from zero would lose its digits
        counts = self.counts[None] if weights is None else weights.to(self.counts) * self.counts
        totals = counts.sum(dim=1, keepdim=True)
        within = (counts / self.counts.clamp(min=1)) @ self.squared_deviations
        between = counts @ means.square() - (counts @ means).square() / totals
        sigma = ((within + between).clamp(min=0) / totals).sqrt()
        return sigma[0] if weights is None else sigma

    def value(self) -> float:
        """H(F) in nats."""
        return self.values(None).item()

    def values(self, weights: torch.Tensor | None) -> torch.Tensor:
        """H(F) in nats of each resample (see [`~GaussianEntropy.sigma`]), shape `(resamples,)`."""
        return self.sigma(weights).clamp(min=SMALLEST_SIGMA).log().sum(dim=-1)

    def dead_channels(self) -> int:
        """Number of channels that never change (sigma below `SMALLEST_SIGMA`)."""
        return int((self.sigma() < SMALLEST_SIGMA).sum().item())


def merge_across_processes(estimates: list[GaussianEntropy]) -> None:
    """Merge each estimate with those of all processes of the default group, in rank order; the same on each."""
    if rank_and_num_processes()[1] == 1:
        return
    names = ("counts", "means", "squared_deviations")
    own = [None if one.counts is None else tuple(getattr(one, name).cpu() for name in names) for one in estimates]
    for estimate, *parts in zip(estimates, *gather(own), strict=True):
        estimate.counts = estimate.means = estimate.squared_deviations = None
        for moments in parts:
            if moments is not None:
                estimate._merge(*moments)
