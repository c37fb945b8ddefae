"""Metrics as a module of `evaluate`, without a download: `evaluate.load` needs the Hub at run time."""

from collections.abc import Sequence

import datasets
import evaluate
import numpy as np
import torch

from ..data.dataset import LEFT_OUT


class TopKAccuracy(evaluate.Metric):
    """
    Share of images whose label is among the `k` best-scored classes. With several `k`, one entry for each.

    Example:

    ```python
    >>> from lambda_vit_hf.evaluation.metrics import TopKAccuracy

    >>> metric = TopKAccuracy()
    >>> metric.compute(predictions=[[0.1, 0.9], [0.8, 0.2]], references=[1, 1], k=1)
    {'accuracy': 0.5}
    ```
    """

    def _info(self):
        return evaluate.MetricInfo(
            description="Top-k accuracy from class scores.",
            citation="",
            inputs_description="predictions: scores (images, classes); references: labels (images,); k: int or ints.",
            features=datasets.Features(
                {"predictions": datasets.Sequence(datasets.Value("float32")), "references": datasets.Value("int64")}
            ),
        )

    def _compute(self, predictions, references, k: int | Sequence[int] = 1):
        order = np.argsort(-np.asarray(predictions), axis=1, kind="stable")
        hits = order == np.asarray(references)[:, None]
        if isinstance(k, int):
            return {"accuracy": float(hits[:, :k].any(axis=1).mean())}
        names = {one: "accuracy" if one == 1 else f"top{one}_accuracy" for one in k}
        return {name: float(hits[:, :one].any(axis=1).mean()) for one, name in names.items()}


def classification_metrics(prediction) -> dict[str, float]:
    """
    `compute_metrics` for the Trainer: top-1 as `accuracy`; `top5_accuracy` where there are over five classes.

    Images labelled -100, that is, unreadable ones, are left out.

    Raises:
        ValueError: if no image has a label.
    """
    labelled = prediction.label_ids != LEFT_OUT
    if not labelled.any():
        raise ValueError("No image of the evaluation set could be read: there is no accuracy to report.")
    scores, labels = (np.asarray(one[labelled]) for one in (prediction.predictions, prediction.label_ids))
    k = (1, 5) if scores.shape[-1] > 5 else (1,)
    scores, labels = shortlist(torch.from_numpy(scores), torch.from_numpy(labels))
    # In memory: a cache on the disk is shared by all processes.
    return TopKAccuracy(keep_in_memory=True).compute(predictions=scores.numpy(), references=labels.numpy(), k=k)


def shortlist(scores: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """
    As much of the scores as top-1 and top-5 depend on: the six best, or the five best and the right class's.

    `evaluate` writes scores to a table row by row: all of ImageNet's would take minutes and gigabytes.

    Args:
        scores (`torch.Tensor` of shape `(images, classes)`): of all classes.
        labels (`torch.Tensor` of shape `(images,)`): class indices, or -100.

    Returns:
        Scores `(images, at most 6)`, best first, and the place of the right class among them (or -100).
    """
    places = scores.argsort(dim=1, descending=True, stable=True)[:, :6].clone()
    missing = (labels != LEFT_OUT) & ~(places == labels[:, None]).any(dim=1)
    places[missing, -1] = labels[missing]
    found = (places == labels[:, None]).int().argmax(dim=1)
    return scores.gather(1, places), torch.where(labels == LEFT_OUT, labels, found)
