"""What a model costs: parameters, multiply-accumulates, and a summary layer by layer."""

from ..models.configuration_lambda_vit import LambdaViTConfig
from ..models.token_merging import most_mergeable


def _pair(size) -> tuple[int, int]:
    return tuple(size) if isinstance(size, (list, tuple)) else (size, size)


def count_macs(config: LambdaViTConfig, num_labels: int | None = None) -> int:
    """
    Multiply-accumulates of one forward pass on one image of `config.image_size`.

    Counted: patch embedding, linear layers, the two matrix products of attention, the comparison of keys where tokens
    merge, the class head. Not counted: adds, LayerNorm, softmax, activations (under 1 % in ViT-B). ViT-B/16 at 224:
    17.6 G. Where tokens merge, later layers are counted with the tokens that are left. What `prepare_for_inference`
    saves besides is not subtracted.

    Args:
        config ([`LambdaViTConfig`] or any `ViTConfig`): the shape of the model; without `attention_flags`, all kept.
        num_labels (`int`, *optional*): classes of the head; defaults to `config.num_labels`. 0: no head.
    """
    (height, width), (patch_height, patch_width) = _pair(config.image_size), _pair(config.patch_size)
    patches = (height // patch_height) * (width // patch_width)
    embedding = patches * config.hidden_size * config.num_channels * patch_height * patch_width
    head = config.hidden_size * (config.num_labels if num_labels is None else num_labels)
    return embedding + _encoder_macs(config, patches + 1) + head


def _encoder_macs(config, tokens: int) -> int:
    hidden, macs = config.hidden_size, 0
    kept = [True] * config.num_hidden_layers
    merged = config.token_merging_schedule() if isinstance(config, LambdaViTConfig) else [0] * len(kept)
    for has_attention, r in zip(getattr(config, "attention_flags", kept), merged, strict=True):
        macs += has_attention * (4 * tokens * hidden**2 + 2 * tokens**2 * hidden)
        r = min(r, most_mergeable(tokens))
        if r:
            macs += ((tokens + 1) // 2) * (tokens // 2) * (hidden // config.num_attention_heads)
            tokens -= r
        macs += 2 * tokens * hidden * config.intermediate_size
    return macs


def count_parameters(model) -> int:
    """Number of parameters (buffers not counted)."""
    return sum(parameter.numel() for parameter in model.parameters())


def summarize(model) -> str:
    """
    A table of a LambdaViT's layers: kept, diluting (with lambda), off or removed; parameters and MACs.

    Example:

    ```python
    >>> print(summarize(model))
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
    }
    num_labels = model.config.num_labels if hasattr(model, "classifier") else 0
    lines.append(
        f"attention: {', '.join(f'{count} {name}' for name, count in counts.items() if count)};"
        f" {count_parameters(model):,} parameters; {count_macs(model.config, num_labels) / 1e9:.4g} GMACs per image"
    )
    return "\n".join(lines)
