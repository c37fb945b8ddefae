"""Metrics as `evaluate` defines them, without a download: `evaluate.load` needs the Hub at run time."""

import datasets
import evaluate
import numpy as np


class TopKAccuracy(evaluate.Metric):
    """
    Share of images whose label is among the `k` best-scored classes.

    Example:

    ```python
    >>> metric = TopKAccuracy()
    >>> metric.compute(predictions=[[0.1, 0.9], [0.8, 0.2]], references=[1, 1], k=1)
    {'accuracy': 0.5}
    ```
    """

    def _info(self):
        return evaluate.MetricInfo(
            description="Top-k accuracy from class scores.",
            citation="",
            inputs_description="predictions: scores (images, classes); references: labels (images,); k: int.",
            features=datasets.Features(
                {"predictions": datasets.Sequence(datasets.Value("float32")), "references": datasets.Value("int64")}
            ),
        )

    def _compute(self, predictions, references, k: int = 1):
        return {"accuracy": top_k_accuracy(np.asarray(predictions), np.asarray(references), k)}


def top_k_accuracy(scores: np.ndarray, labels: np.ndarray, k: int = 1) -> float:
    """Share of images whose label is among the `k` best of `scores` `(images, classes)`."""
    best = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return float((best == labels[:, None]).any(axis=1).mean())


def classification_metrics(prediction) -> dict[str, float]:
    """
    `compute_metrics` for the Trainer: top-1 as `accuracy`; `top5_accuracy` where there are over five classes.

    Images labelled -100, that is, unreadable ones, are left out.

    Raises:
        ValueError: if no image has a label.
    """
    labelled = prediction.label_ids != -100
    if not labelled.any():
        raise ValueError("No image of the evaluation set could be read: there is no accuracy to report.")
    scores, labels = prediction.predictions[labelled], prediction.label_ids[labelled]
    # Not through TopKAccuracy: `evaluate` writes scores to a table on the disk, a minute for those of ImageNet.
    results = {"accuracy": top_k_accuracy(scores, labels)}
    if scores.shape[-1] > 5:
        results["top5_accuracy"] = top_k_accuracy(scores, labels, k=5)
    return results
