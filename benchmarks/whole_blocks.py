"""The rival of removing attention: whole blocks, attention and MLP, as many as save the same multiply-accumulates."""

import copy

import torch

from lambda_vit_hf.evaluation.accounting import count_macs
from lambda_vit_hf.models.problem_type import SINGLE_LABEL
from lambda_vit_hf.selection.output_change import sum_of_changes
from lambda_vit_hf.selection.strategies import greedy


def without_blocks(model, blocks: list[int]):
    """
    A copy of a model without some of its blocks.

    Args:
        model ([`LambdaPreTrainedModel`]): with all its attention.
        blocks (`list[int]`): 0-based.

    Raises:
        ValueError: if a layer has lost its attention.
    """
    if model.config.removed_layers:
        raise ValueError(f"Layers {model.config.removed_layers} have lost their attention.")
    kept = [index for index in range(model.config.num_hidden_layers) if index not in blocks]
    values = model.config.to_dict()
    for name in ("attention_flags", "stage_names", "out_features", "out_indices"):
        values.pop(name, None)
    config = type(model.config).from_dict({**values, "num_hidden_layers": len(kept)})
    smaller = type(model)(config)
    smaller.to(model.device, model.dtype).train(model.training)
    inner = {id(module) for layer in model.encoder_layers for module in layer.modules()}
    smaller.load_state_dict(
        {
            name: value
            for name, value in model.state_dict().items()
            if id(model.get_submodule(name.rpartition(".")[0])) not in inner
        },
        strict=False,
    )
    for new, old in enumerate(kept):
        smaller.encoder_layers[new].load_state_dict(model.encoder_layers[old].state_dict())
    return smaller


def count_equal_blocks(model, num_layers: int) -> int:
    """How many whole blocks save about as many multiply-accumulates as the attention of `num_layers` layers."""
    config = copy.deepcopy(model.config)
    depth = config.num_hidden_layers
    whole = count_macs(config)
    config.attention_flags = [index >= num_layers for index in range(depth)]
    of_attention = whole - count_macs(config)
    shallow = without_blocks(model, [0]).config
    return max(1, round(of_attention / (whole - count_macs(shallow))))


@torch.no_grad()
def choose_blocks(model, calibration: torch.Tensor, number: int, batch_size: int = 64) -> list[int]:
    """
    Greedily, the blocks without which the class probabilities stay nearest to the whole model's (KL).

    Args:
        model ([`LambdaPreTrainedModel`]): a classifier in eval mode.
        calibration (`torch.Tensor` of shape `(images, channels, height, width)`).
        number (`int`): of blocks.
    """

    def logits(one) -> torch.Tensor:
        return torch.cat([one(batch.to(one.device)).logits for batch in calibration.split(batch_size)])

    whole = logits(model)

    def changes(sets: list[list[int]]) -> list[float]:
        return [sum_of_changes(whole, logits(without_blocks(model, one)), SINGLE_LABEL)[0].item() for one in sets]

    return sorted(greedy(range(model.config.num_hidden_layers), number, changes))
