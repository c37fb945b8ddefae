"""How far one output of a model is from another: what masking layers changes. Needs no labels."""

from dataclasses import dataclass

import torch
from torch.nn import functional

from ..models.problem_type import MULTI_LABEL, REGRESSION, SINGLE_LABEL, problem_type_of


FEATURES = "features"
DIVERGENCES = {
    SINGLE_LABEL: "KL (nats)",
    MULTI_LABEL: "KL (nats)",
    REGRESSION: "squared change / 2",
    FEATURES: "1 - cosine",
}
AGREEMENTS = {SINGLE_LABEL: "same class", MULTI_LABEL: "same labels"}


@dataclass(frozen=True)
class OutputChange:
    """
    How a model's output changes when layers are masked.

    Attributes:
        divergence: KL(whole || masked), in nats, of what the logits say, the mean over images: of the probabilities of
            classes; of each label's, added up; of values half their squared change, which is the KL of normal
            distributions of variance 1. Of features 1 - their cosine.
        agreement: share of images, in [0, 1], whose most probable class stays; of several labels, those all of whose
            labels stay, that is, on their side of 1/2; `None` for values and features.
        kind: `"single_label_classification"`, `"multi_label_classification"`, `"regression"` or `"features"`.

    Raises:
        ValueError: on another kind, or an agreement that it does not have.
    """

    divergence: float
    agreement: float | None
    kind: str = ""

    def __post_init__(self):
        if not self.kind:  # written by a version that knew two
            object.__setattr__(self, "kind", FEATURES if self.agreement is None else SINGLE_LABEL)
        if self.kind not in DIVERGENCES or (self.agreement is None) == (self.kind in AGREEMENTS):
            raise ValueError(f"No change of an output: {self.kind!r} with agreement {self.agreement}.")

    @classmethod
    def of_means(cls, divergence: float, agreement: float, kind: str) -> "OutputChange":
        """From the means of what [`sum_of_changes`] adds up."""
        return cls(divergence, agreement if kind in AGREEMENTS else None, kind)


def kind_of_output(model, output: str) -> str:
    """The [`OutputChange`]'s `kind` of an output of a model, which is named as in [`SelectionConfig`]."""
    return problem_type_of(model.config) if output == "class_head" else FEATURES


def sum_of_changes(whole: torch.Tensor, masked: torch.Tensor, kind: str) -> torch.Tensor:
    """Sums over a batch of outputs, `(batch, features)`: of divergence, and of images that agree."""
    whole, masked = whole.double(), masked.double()
    agreeing = whole.new_zeros(())
    if kind == FEATURES:
        divergence = (1 - torch.cosine_similarity(whole, masked, dim=-1)).sum()
    elif kind == REGRESSION:
        divergence = (whole - masked).square().sum() / 2
    elif kind == MULTI_LABEL:
        agreeing = ((whole > 0) == (masked > 0)).all(dim=-1).double().sum()
        divergence = sum(
            (whole_log.exp() * (whole_log - masked_log)).sum()
            for whole_log, masked_log in (
                (functional.logsigmoid(sign * whole), functional.logsigmoid(sign * masked)) for sign in (1, -1)
            )
        )
    else:
        agreeing = (whole.argmax(dim=-1) == masked.argmax(dim=-1)).double().sum()
        whole, masked = whole.log_softmax(dim=-1), masked.log_softmax(dim=-1)
        divergence = functional.kl_div(masked, whole, log_target=True, reduction="sum")
    return torch.stack([divergence, agreeing]).cpu()
