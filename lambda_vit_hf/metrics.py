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
        scores = np.asarray(predictions)
        best = np.argsort(-scores, axis=1, kind="stable")[:, :k]
        return {"accuracy": float((best == np.asarray(references)[:, None]).any(axis=1).mean())}


def classification_metrics(prediction) -> dict[str, float]:
    """`compute_metrics` for the Trainer: top-1 as `accuracy`; `top5_accuracy` where there are over five classes."""
    metric = TopKAccuracy()
    scores, labels = prediction.predictions, prediction.label_ids
    results = {"accuracy": metric.compute(predictions=scores, references=labels)["accuracy"]}
    if scores.shape[-1] > 5:
        results["top5_accuracy"] = metric.compute(predictions=scores, references=labels, k=5)["accuracy"]
    return results
