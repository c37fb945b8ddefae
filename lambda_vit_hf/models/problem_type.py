"""What the logits of a classifier say: one of several classes, several labels, or values."""

SINGLE_LABEL, MULTI_LABEL, REGRESSION = "single_label_classification", "multi_label_classification", "regression"


def problem_type_of(config) -> str:
    """
    What transformers' `pipeline("image-classification")` takes a classifier for.

    Args:
        config: of a model with a class head; see [`LambdaViTConfig`].

    Returns:
        `"regression"`: logits are values; `"multi_label_classification"`: each logit, by the sigmoid, tells the
        probability of one label, and so does a single logit; `"single_label_classification"`: softmax.
    """
    problem_type = getattr(config, "problem_type", None)
    if problem_type == REGRESSION:
        return REGRESSION
    return MULTI_LABEL if problem_type == MULTI_LABEL or getattr(config, "num_labels", None) == 1 else SINGLE_LABEL
