"""Rules that need the labels of the calibration images, which `lambda-vit select` does not: what are labels worth?

Each is a strategy, `(search, labels) -> layers`; `labels` are those of the calibration images, `(images,)`.
"""

import torch
from torch.nn import functional

from lambda_vit_hf.selection.search import AttentionSearch
from lambda_vit_hf.selection.strategies import greedy


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
    all images; one backward pass.
    """
    model = search.passes.model
    gradient = torch.zeros(len(model.encoder_layers), dtype=torch.float64)
    batches = iter(labels.split(search.passes.batches.batch_size))

    @torch.enable_grad()
    def measure(pixel_values, folds):
        hidden_states, extra = model.embed(pixel_values)
        lambdas = torch.ones(len(gradient), device=pixel_values.device, requires_grad=True)
        for value, layer in zip(lambdas, model.encoder_layers, strict=True):
            masked = 2 * hidden_states if search.forward.mask == "identity" else hidden_states
            mixed = layer.mix_tokens(hidden_states, **extra)
            hidden_states = layer.feed_forward(masked + value * (mixed - masked))
        logits, targets = model.read_out(hidden_states, "class_head"), next(batches).to(pixel_values.device)
        summed = functional.cross_entropy(logits.float(), targets, reduction="sum")
        gradient.add_(torch.autograd.grad(summed, lambdas)[0].double().cpu())

    search.passes.for_each_batch(measure, "gradient of the loss")
    return sorted(search.candidates, key=lambda layer: gradient[layer].abs().item())[: search.num_layers]


LABEL_STRATEGIES = {"loss": loss, "loss_gradient": loss_gradient}
