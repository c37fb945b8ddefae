"""Top-k accuracy, against counting by hand."""

import evaluate
import numpy as np
import pytest
from transformers import EvalPrediction

from lambda_vit_hf.evaluation.metrics import TopKAccuracy, classification_metrics


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """`evaluate` writes what it is given to a cache; the tests' is not the user's."""
    monkeypatch.setattr(evaluate.config, "HF_METRICS_CACHE", tmp_path / "metrics")


# The label's rank among the scores, from 1: 1, 2, 5, 6, 7.
SCORES = np.array(
    [
        [0.9, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6],
        [0.9, 0.8, 0.2, 0.3, 0.4, 0.5, 0.6],
        [0.7, 0.6, 0.3, 0.5, 0.4, 0.1, 0.2],
        [0.7, 0.6, 0.5, 0.2, 0.4, 0.3, 0.1],
        [0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1],
    ]
)
LABELS = np.array([0, 1, 2, 3, 6])


@pytest.mark.parametrize(("k", "accuracy"), [(1, 0.2), (2, 0.4), (4, 0.4), (5, 0.6), (6, 0.8), (7, 1.0), (100, 1.0)])
def test_the_label_counts_among_the_k_best_scores(k, accuracy):
    computed = TopKAccuracy().compute(predictions=SCORES, references=LABELS, k=k)
    assert computed == {"accuracy": pytest.approx(accuracy)}


def test_top_1_is_the_default():
    assert TopKAccuracy().compute(predictions=SCORES, references=LABELS) == {"accuracy": pytest.approx(0.2)}


def test_batches_may_be_added_one_by_one():
    metric = TopKAccuracy()
    metric.add_batch(predictions=SCORES[:2], references=LABELS[:2])
    metric.add_batch(predictions=SCORES[2:], references=LABELS[2:])
    assert metric.compute(k=5) == {"accuracy": pytest.approx(0.6)}


def test_negative_scores_and_plain_lists_count_too():
    # Logits are no probabilities.
    metric = TopKAccuracy()
    scores = [[-3.0, -1.0], [-1.0, -2.0], [-9.0, 1.0], [-5.0, -4.0]]
    assert metric.compute(predictions=scores, references=[1, 1, 1, 1]) == {"accuracy": 0.75}


def test_the_trainer_gets_top_1_and_top_5():
    metrics = classification_metrics(EvalPrediction(predictions=SCORES, label_ids=LABELS))
    assert metrics == {"accuracy": pytest.approx(0.2), "top5_accuracy": pytest.approx(0.6)}


@pytest.mark.parametrize("num_classes", [2, 5])
def test_top_5_of_five_classes_or_fewer_is_not_reported(num_classes):
    # It would be 100 % whatever the model.
    scores = np.eye(num_classes)
    metrics = classification_metrics(EvalPrediction(predictions=scores, label_ids=np.arange(num_classes)))
    assert metrics == {"accuracy": 1.0}


def test_metrics_are_plain_floats():
    # They go into trainer_state.json.
    metrics = classification_metrics(EvalPrediction(predictions=SCORES, label_ids=LABELS))
    assert {type(value) for value in metrics.values()} == {float}
