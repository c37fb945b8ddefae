"""
Rules to compare with, that are no strategies of the package: those that need the labels of the calibration images
(what are labels worth?), and one that learns a lambda for each layer.

Each is a strategy, `(search, labels) -> layers`; `labels` are those of the calibration images, `(images,)`.
"""

from collections.abc import Callable

import torch
from torch.nn import functional

from lambda_vit_hf.selection.search import AttentionSearch
from lambda_vit_hf.selection.strategies import greedy


NUM_STEPS, FIRST_STEP = 24, 0.25  # of `learned_lambdas`


def loss(search: AttentionSearch, labels: torch.Tensor) -> list[int]:
    """Greedily, the layer without which the cross-entropy of the labels is least."""

    def losses(sets: list[list[int]]) -> list[float]:
        sums = torch.zeros(len(sets), dtype=torch.float64)
        batches = iter(labels.split(search.passes.batches.batch_size))

        def measure(pixel_values: torch.Tensor, folds: torch.Tensor) -> None:
            targets = next(batches).to(pixel_values.device)
            for (position,), logits in search.forward(pixel_values, sets):
                sums[position] += functional.cross_entropy(logits.double(), targets, reduction="sum").cpu()

        search.passes.for_each_batch(measure, "loss")
        return sums.tolist()

    return greedy(search.candidates, search.num_layers, losses)


def loss_gradient(search: AttentionSearch, labels: torch.Tensor) -> list[int]:
    """
    The layers of which the loss depends least on lambda at 1: first order, |d loss / d lambda|, the loss a mean over
    all images; one backward pass for each batch.
    """
    batches = iter(labels.split(search.passes.batches.batch_size))

    def cross_entropy(logits: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        return functional.cross_entropy(logits, next(batches).to(logits.device), reduction="sum")

    gradient = _gradient(search, torch.ones(len(search.passes.model.encoder_layers)), cross_entropy)
    return sorted(search.candidates, key=lambda layer: gradient[layer].abs().item())[: search.num_layers]


def learned_lambdas(search: AttentionSearch, labels: torch.Tensor) -> list[int]:
    """
    A dilution of all layers at once with the weights fixed: lambdas in [0, 1], whose sum is that of the layers to be
    kept, with the least KL divergence from the whole model, by projected steps down its gradient; the layers of least
    lambda. Without labels; deterministic.
    """
    lambdas = torch.ones(len(search.passes.model.encoder_layers))
    candidates = torch.tensor(search.candidates)
    kept = len(candidates) - search.num_layers
    lambdas[candidates] = kept / len(candidates)
    for step in range(NUM_STEPS):
        gradient = _gradient(search, lambdas, _divergence)[candidates]
        gradient = gradient - gradient.mean()  # along the plane of equal sums
        length = FIRST_STEP * (1 - step / NUM_STEPS) / max(gradient.abs().max().item(), 1e-30)
        lambdas[candidates] = _with_sum(lambdas[candidates] - length * gradient.float(), kept)
    return sorted(search.candidates, key=lambda layer: lambdas[layer].item())[: search.num_layers]


def _divergence(logits: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
    whole, logits = whole.log_softmax(dim=-1), logits.log_softmax(dim=-1)
    return functional.kl_div(logits, whole, log_target=True, reduction="sum")


def _gradient(
    search: AttentionSearch, lambdas: torch.Tensor, measure: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """
    d measure / d lambda of every layer, `(layers,)`, where layers fade as the search masks them.

    Args:
        lambdas (`torch.Tensor` of shape `(layers,)`): where to take it.
        measure (`Callable`): from the logits at these lambdas and the whole model's, `(batch, classes)`, in float32,
            to one number, which is summed over the batches.
    """
    model = search.passes.model
    gradient = torch.zeros(len(lambdas), dtype=torch.float64)

    @torch.enable_grad()
    def add(pixel_values: torch.Tensor, folds: torch.Tensor) -> None:
        values = lambdas.to(pixel_values.device).requires_grad_()
        with torch.no_grad():
            whole = _logits_at(model, pixel_values, torch.ones_like(values), search.forward.mask)
        summed = measure(_logits_at(model, pixel_values, values, search.forward.mask).float(), whole.float())
        gradient.add_(torch.autograd.grad(summed, values)[0].double().cpu())

    search.passes.for_each_batch(add, "gradient by lambda")
    return gradient


def _logits_at(model, pixel_values: torch.Tensor, lambdas: torch.Tensor, mask: str) -> torch.Tensor:
    hidden_states, extra = model.embed(pixel_values)
    for value, layer in zip(lambdas, model.encoder_layers, strict=True):
        masked = 2 * hidden_states if mask == "identity" else hidden_states
        hidden_states = layer.feed_forward(masked + value * (layer.mix_tokens(hidden_states, **extra) - masked))
    return model.read_out(hidden_states, "class_head")


def _with_sum(values: torch.Tensor, total: float) -> torch.Tensor:
    """The nearest point in [0, 1] whose sum is this: all are moved by one number, found by bisection."""
    least, most = -values.max().item(), 1 - values.min().item()
    for _ in range(60):
        middle = (least + most) / 2
        if (values + middle).clamp(0, 1).sum() < total:
            least = middle
        else:
            most = middle
    return (values + most).clamp(0, 1)


MORE_STRATEGIES = {"loss": loss, "loss_gradient": loss_gradient, "learned_lambdas": learned_lambdas}
