"""How far one output of a model is from another: what masking layers changes. Needs no labels."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class OutputChange:
    """
    How a model's output changes when layers are masked.

    Attributes:
        divergence: of the class probabilities KL(whole || masked) in nats; of features 1 - their cosine. The mean over
            the images.
        agreement: share of images, in [0, 1], whose most probable class stays; `None` for features.
    """

    divergence: float
    agreement: float | None


def sum_of_changes(whole: torch.Tensor, masked: torch.Tensor, of_classes: bool) -> torch.Tensor:
    """Sums over a batch of outputs, `(batch, features)`: of divergence, and of images that keep their class."""
    whole, masked = whole.double(), masked.double()
    if not of_classes:
        return torch.stack([(1 - torch.cosine_similarity(whole, masked, dim=-1)).sum(), whole.new_zeros(())]).cpu()
    whole, masked = whole.log_softmax(dim=-1), masked.log_softmax(dim=-1)
    divergence = torch.nn.functional.kl_div(masked, whole, log_target=True, reduction="sum")
    return torch.stack([divergence, (whole.argmax(dim=-1) == masked.argmax(dim=-1)).double().sum()]).cpu()
