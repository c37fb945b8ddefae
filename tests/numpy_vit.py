"""A ViT in plain numpy, from its definition, with some attention layers masked: what the search is compared with."""

import numpy as np
import torch
from scipy.special import erf


def masked_output(model, images: torch.Tensor, masked, mask: str, output: str) -> np.ndarray:
    """Output of a LambdaViT with all its attention, `(images, features)`; every set is computed from the image on."""
    weights = {name: value.double().numpy() for name, value in model.state_dict().items()}
    config = model.config
    x = _embed(weights, images.double().numpy(), config.patch_size)
    for index in range(config.num_hidden_layers):
        layer = f"vit.layers.{index}."
        if index not in masked:
            x = x + _attention(weights, layer, _norm(weights, layer + "layernorm_before", x, config), config)
        elif mask == "identity":
            x = 2 * x
        hidden = _linear(weights, layer + "mlp.fc1", _norm(weights, layer + "layernorm_after", x, config))
        x = x + _linear(weights, layer + "mlp.fc2", hidden * (1 + erf(hidden / np.sqrt(2))) / 2)
    x = _norm(weights, "vit.layernorm", x, config)
    if output == "token_mean":
        return x.mean(axis=1)
    return _linear(weights, "classifier", x[:, 0]) if output == "class_head" else x[:, 0]


def entropy(features: np.ndarray) -> float:
    """Sum over channels of log sigma."""
    return np.log(features.std(axis=0)).sum()


def _embed(weights, images: np.ndarray, patch_size: int) -> np.ndarray:
    count, channels, height, width = images.shape
    rows, columns = height // patch_size, width // patch_size
    patches = images.reshape(count, channels, rows, patch_size, columns, patch_size).transpose(0, 2, 4, 1, 3, 5)
    kernel = weights["vit.embeddings.patch_embeddings.projection.weight"]
    patches = patches.reshape(count, rows * columns, -1) @ kernel.reshape(len(kernel), -1).T
    patches = patches + weights["vit.embeddings.patch_embeddings.projection.bias"]
    class_token = np.broadcast_to(weights["vit.embeddings.cls_token"], (count, 1, len(kernel)))
    return np.concatenate([class_token, patches], axis=1) + weights["vit.embeddings.position_embeddings"]


def _attention(weights, layer: str, x: np.ndarray, config) -> np.ndarray:
    count, tokens, hidden = x.shape
    heads, width = config.num_attention_heads, hidden // config.num_attention_heads
    query, key, value = (
        _linear(weights, f"{layer}attention.{name}_proj", x).reshape(count, tokens, heads, width).swapaxes(1, 2)
        for name in "qkv"
    )
    scores = query @ key.swapaxes(2, 3) / np.sqrt(width)
    scores = np.exp(scores - scores.max(axis=-1, keepdims=True))
    mixed = (scores / scores.sum(axis=-1, keepdims=True)) @ value
    return _linear(weights, f"{layer}attention.o_proj", mixed.swapaxes(1, 2).reshape(count, tokens, hidden))


def _linear(weights, name: str, x: np.ndarray) -> np.ndarray:
    return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def _norm(weights, name: str, x: np.ndarray, config) -> np.ndarray:
    x = x - x.mean(axis=-1, keepdims=True)
    x = x / np.sqrt(x.var(axis=-1, keepdims=True) + config.layer_norm_eps)
    return x * weights[f"{name}.weight"] + weights[f"{name}.bias"]
