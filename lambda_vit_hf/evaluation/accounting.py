"""What a model costs: parameters, multiply-accumulates, and a summary layer by layer."""

import copy

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForImageClassification, PreTrainedConfig

from ..models.image_size import as_pair


_counted: dict[tuple[type, str], int] = {}


def count_macs(config: PreTrainedConfig, num_labels: int | None = None) -> int:
    """
    Multiply-accumulates of one forward pass on one image of `config.image_size`, as torch counts them.

    Counted: convolutions and matrix products: patch embedding, linear layers, the two products of attention, the
    comparison of keys where tokens merge, the class head. Not counted: adds, LayerNorm, softmax, activations (under
    1 % in ViT-B). ViT-B/16 at 224: 17.6 G. Where tokens merge, later layers are counted with the tokens that are left.
    What `prepare_for_inference` saves besides is not subtracted.

    Args:
        config ([`LambdaViTConfig`], that of another family, or one of transformers): the shape of the model.
        num_labels (`int`, *optional*): classes of the head; defaults to `config.num_labels`. 0: no head.
    """
    config = copy.deepcopy(config)
    config._name_or_path = ""
    if num_labels is not None:
        config.num_labels = num_labels
    key = (type(config), config.to_json_string(use_diff=False))
    if key not in _counted:  # a training asks seven times
        with torch.device("meta"), FlopCounterMode(display=False) as counter:  # shapes alone: nothing is computed
            model = AutoModelForImageClassification.from_config(config, attn_implementation="eager").eval()
            model(torch.empty(1, config.num_channels, *as_pair(config.image_size)))
        _counted[key] = counter.get_total_flops() // 2
    return _counted[key]


def count_parameters(model) -> int:
    """Number of parameters (buffers not counted)."""
    return sum(parameter.numel() for parameter in model.parameters())


def summarize(model) -> str:
    """
    A table of a Lambda model's layers: kept, diluting (with lambda), off, removed or mapped; parameters and MACs.

    Example:

    ```python
    >>> from lambda_vit_hf import LambdaViTConfig, LambdaViTForImageClassification, summarize

    >>> config = LambdaViTConfig(num_hidden_layers=3, attention_flags=[False, True, True], hidden_size=192,
    ...                          num_attention_heads=3, intermediate_size=768)
    >>> print(summarize(LambdaViTForImageClassification(config)))
    layer  attention            parameters
        0  removed                 296,256
        1  kept                    444,864
        2  kept                    444,864
    attention: 2 kept, 1 removed; 1,372,418 parameters; 0.2911 GMACs per image
    ```
    """
    lines = [f"{'layer':>5}  {'attention':<18} {'parameters':>12}"]
    for index, layer in enumerate(model.encoder_layers):
        state = layer.attention_state
        if state == "diluting":
            state = f"diluting {layer.attention_lambda.item():.3f}"
        lines.append(f"{index:>5}  {state:<18} {count_parameters(layer):>12,}")
    states = [layer.attention_state for layer in model.encoder_layers]
    counts = {
        "kept": states.count("kept"),
        "diluting": states.count("diluting"),
        "off": states.count("off"),
        "removed": states.count("removed") + states.count("folded"),
        "mapped": states.count("mapped"),
    }
    num_labels = model.config.num_labels if model.has_class_head else 0
    lines.append(
        f"attention: {', '.join(f'{count} {name}' for name, count in counts.items() if count)};"
        f" {count_parameters(model):,} parameters; {count_macs(model.config, num_labels) / 1e9:.4g} GMACs per image"
    )
    return "\n".join(lines)
