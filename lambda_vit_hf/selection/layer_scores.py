"""What single attention layers are rated by, each on its own: rules that NOSE is compared with.

A score is a function from an [`AttentionSearch`] to one value per layer, `None` without attention; the layers of least
value go first.
"""

import torch

from .masked_forward import MaskedForward
from .output_change import kind_of_output, sum_of_changes
from .processes import gather
from .search import AttentionSearch


NUM_INTERVALS = 256
SMALL_SHARE = 0.1


def attention_influence(search: AttentionSearch) -> list[float | None]:
    """
    How much each layer's attention changes the direction of its input: 1 - cos(x, x + Attention(LayerNorm(x))), the
    mean over images and tokens. The block influence of ShortGPT (arXiv 2403.03853) and LLM-Drop (arXiv 2406.15786).
    """
    model, layers = search.passes.model, search.passes.model.encoder_layers
    sums = torch.zeros(len(layers) + 1, dtype=torch.float64)

    def measure(pixel_values: torch.Tensor, folds: torch.Tensor) -> None:
        hidden_states, extra = model.embed(pixel_values)
        sums[-1] += hidden_states.shape[0] * hidden_states.shape[1]
        for index, layer in enumerate(layers):
            mixed = layer.mix_tokens(hidden_states, **extra)
            cosine = torch.cosine_similarity(hidden_states.double(), mixed.double(), dim=-1)
            sums[index] += (1 - cosine).sum().cpu()
            hidden_states = layer.feed_forward(mixed)

    search.passes.for_each_batch(measure, "attention influence")
    total = sum(gather(sums))
    return _of_candidates(search, (total[:-1] / total[-1]).tolist())


def attention_deviation(search: AttentionSearch) -> list[float | None]:
    """
    How much each layer's attention maps depend on the image: the standard deviation over images of each attention
    probability, the mean over heads, queries and keys. (arXiv 2605.22132 replaces the attention of least deviation by
    convolution.)
    """
    model, layers = search.passes.model, search.passes.model.encoder_layers
    implementation = model.config._attn_implementation
    moments: list = [0.0 if layer.has_attention else None for layer in layers]

    def measure(pixel_values: torch.Tensor, folds: torch.Tensor) -> None:
        hidden_states, extra = model.embed(pixel_values)
        for index, layer in enumerate(layers):
            if layer.has_attention:
                maps = layer.attention_maps(hidden_states, **extra).double()
                moments[index] += torch.stack([maps.sum(dim=0), maps.square().sum(dim=0)]).cpu()
            hidden_states = layer.feed_forward(layer.mix_tokens(hidden_states, **extra))

    def mean_deviation(of_layer: torch.Tensor) -> float:
        first, second = sum(gather(of_layer)) / search.passes.batches.num_images
        return (second - first.square()).clamp(min=0).sqrt().mean().item()

    model.set_attn_implementation("eager")  # the only one that gives its maps
    try:
        search.passes.for_each_batch(measure, "attention maps")
    finally:
        model.set_attn_implementation(implementation)
    return [None if of_layer is None else mean_deviation(of_layer) for of_layer in moments]


def attention_benefit(search: AttentionSearch) -> list[float | None]:
    """
    How much nearer each layer's attention brings the stream to what the model says in the end: the divergence from the
    output (see [`OutputChange`]) of what is read before the attention, less that after it, the mean over images. The
    block benefit of P3B (arXiv 2506.23675), read by the model's own final LayerNorm and head in place of heads trained
    for each block, and against the model's answer in place of a label.
    """
    model, output = search.passes.model, search.forward.output
    kind, sums = kind_of_output(model, output), torch.zeros(len(model.encoder_layers), dtype=torch.float64)

    def measure(pixel_values: torch.Tensor, folds: torch.Tensor) -> None:
        hidden_states, extra = model.embed(pixel_values)
        read = []
        for layer in model.encoder_layers:
            mixed = layer.mix_tokens(hidden_states, **extra)
            read.append([model.read_out(stream, output) for stream in (hidden_states, mixed)])
            hidden_states = layer.feed_forward(mixed)
        whole = model.read_out(hidden_states, output)
        for index, (before, after) in enumerate(read):
            before, after = (sum_of_changes(whole, one, kind)[0] for one in (before, after))
            sums[index] += before - after

    search.passes.for_each_batch(measure, "benefit of attention")
    return _of_candidates(search, (sum(gather(sums)) / search.passes.batches.num_images).tolist())


def lambda_sensitivity(search: AttentionSearch) -> list[float | None]:
    """
    How much the output depends on each layer's lambda at 1: twice the divergence (see [`OutputChange`]) at lambda =
    0.9, over 0.1 squared. Of class probabilities that is the Fisher information of lambda, E[(d log p / d lambda)^2]
    with classes drawn by the model's own probabilities: what the gradient of the loss is made of where the model is
    right about its probabilities. By differences, for that needs no memory for gradients and no labels.
    """
    model, output = search.passes.model, search.forward.output
    forward = MaskedForward(model, output, search.forward.mask, share=SMALL_SHARE)
    sets = [[], *([layer] for layer in search.candidates)]
    kind, sums = kind_of_output(model, output), torch.zeros(len(model.encoder_layers), dtype=torch.float64)

    def measure(pixel_values: torch.Tensor, folds: torch.Tensor) -> None:
        outputs = {position: features for (position,), features in forward(pixel_values, sets)}
        for position, layer in enumerate(search.candidates, 1):
            sums[layer] += sum_of_changes(outputs[0], outputs[position], kind)[0]

    search.passes.for_each_batch(measure, "sensitivity to lambda")
    means = sum(gather(sums)) / search.passes.batches.num_images
    return _of_candidates(search, (2 * means / SMALL_SHARE**2).tolist())


def weight_entropy(search: AttentionSearch) -> list[float | None]:
    """
    The entropy, in nats, of each layer's attention weights as numbers: of their histogram over 256 intervals of equal
    width from the least to the largest weight of all layers. Needs no images. Gardener (arXiv 2602.03918) drops the
    blocks of least such entropy.
    """
    layers = search.passes.model.encoder_layers
    weights = {}
    for index in search.candidates:
        matrices = [one for one in layers[index].attention_parameters() if one.dim() > 1]
        weights[index] = torch.cat([one.detach().flatten().float().cpu() for one in matrices])
    least = min((one.min().item() for one in weights.values()), default=0.0)
    largest = max((one.max().item() for one in weights.values()), default=0.0)
    values: list[float | None] = [None] * len(layers)
    for index, numbers in weights.items():
        shares = torch.histc(numbers, NUM_INTERVALS, least, largest).double() / numbers.numel()
        values[index] = torch.special.entr(shares).sum().item()
    return values


def _of_candidates(search: AttentionSearch, values: list[float]) -> list[float | None]:
    return [value if layer in search.candidates else None for layer, value in enumerate(values)]
