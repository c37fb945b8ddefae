"""Entropy of features by a Gaussian proxy, channel by channel, over any number of batches.

    H(F) = sum over channels j of log sigma_j          (nats)

with sigma_j the standard deviation of channel j over all images and tokens. The constant D/2 * log(2*pi*e) of a
Gaussian is dropped, as in the paper (Lin et al., CVPR 2024, section 3.1, equation 3): only differences are used.
"""

import torch
import torch.distributed as dist


# A channel that never changes carries no information: log(0) would drown every other channel, so sigma stops here.
SMALLEST_SIGMA = 1e-8


class GaussianEntropy:
    """
    Streaming estimate of H(F): count, mean and sum of squared deviations per channel, in float64.

    Memory does not depend on the number of images. Batches and estimates merge exactly, up to rounding, by the
    formula of Chan, Golub and LeVeque (1979), so neither batch size nor order matters.

    Example:

    ```python
    >>> import torch
    >>> estimate = GaussianEntropy()
    >>> for batch in torch.randn(100, 32, 5).mul(2.0):  # sigma = 2 in each of 5 channels
    ...     estimate.update(batch)
    >>> round(estimate.value(), 1)  # 5 * log(2)
    3.5
    ```
    """

    def __init__(self):
        self.count = 0
        self.mean: torch.Tensor | None = None
        self.squared_deviations: torch.Tensor | None = None

    @torch.no_grad()
    def update(self, features: torch.Tensor) -> None:
        """
        Add a batch.

        Args:
            features (`torch.Tensor` of shape `(..., channels)`): e.g. `(batch, tokens, hidden)` or `(batch, classes)`.

        Raises:
            ValueError: if a feature is NaN or infinite.
        """
        features = features.detach().reshape(-1, features.shape[-1]).double()
        if not torch.isfinite(features).all():
            raise ValueError("Features are NaN or infinite: check the weights and the calibration images.")
        if features.shape[0]:
            mean = features.mean(dim=0)
            self._merge(features.shape[0], mean, (features - mean).square().sum(dim=0))

    def _merge(self, count: int, mean: torch.Tensor, squared_deviations: torch.Tensor) -> None:
        if self.count == 0:
            self.count, self.mean, self.squared_deviations = count, mean, squared_deviations
            return
        total = self.count + count
        difference = mean - self.mean
        self.mean = self.mean + difference * (count / total)
        self.squared_deviations = (
            self.squared_deviations + squared_deviations + difference.square() * (self.count * count / total)
        )
        self.count = total

    def merge_across_processes(self) -> None:
        """Merge the estimates of all processes of the default group, in rank order; the same value on each."""
        if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
            return
        own = (self.count, *(None if t is None else t.cpu() for t in (self.mean, self.squared_deviations)))
        parts = [None] * dist.get_world_size()
        dist.all_gather_object(parts, own)
        self.__init__()
        for count, mean, squared_deviations in parts:
            if count:
                self._merge(count, mean, squared_deviations)

    def sigma(self) -> torch.Tensor:
        """
        Standard deviation of each channel (population, ddof 0), shape `(channels,)`, float64.

        Raises:
            ValueError: if nothing was added.
        """
        if self.count == 0:
            raise ValueError("No features were added: the calibration set is empty.")
        return (self.squared_deviations / self.count).sqrt()

    def value(self) -> float:
        """H(F) in nats."""
        return self.sigma().clamp(min=SMALLEST_SIGMA).log().sum().item()

    def dead_channels(self) -> int:
        """Number of channels that never change (sigma below `SMALLEST_SIGMA`)."""
        return int((self.sigma() < SMALLEST_SIGMA).sum().item())
