"""Loading, exactly or not at all: names of weights, what is left to remove, whether all arrived, other image sizes.

Saved models carry this file too: it imports from torch, transformers, configuration and removal only.
"""

import copy
import math

import torch
from torch import nn
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping

from .configuration_lambda_vit import LambdaViTConfig
from .folding import check_layer_indices


_HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
WANTED_REMOVAL = ("attention_flags", "removed_layers", "fold_removed")
_ENCODER_KEYS = ("embeddings.cls_token", "embeddings.position", "embeddings.patch", "layers.", "layernorm.")


def read_vit_key_names(*class_names: str) -> None:
    """
    Let base models of these class names read ViT checkpoints in the key names of transformers 4.

    Files on the Hub carry these names. The renaming on load is looked up by class name and skips subclasses: without
    this, every encoder weight of a ViT checkpoint would be left at its random start.
    """
    for class_name in class_names:
        mapping = get_checkpoint_conversion_mapping("ViTModel")
        register_checkpoint_conversion_mapping(class_name, mapping, overwrite=True)


def read_stored_config(
    source: str, config: LambdaViTConfig | None, arguments: dict
) -> tuple[LambdaViTConfig, LambdaViTConfig, dict]:
    """
    Configuration of a checkpoint, before layers are removed from it.

    Args:
        source (`str`): Folder or repository of the checkpoint.
        config (`LambdaViTConfig`, *optional*): The caller's; by default the checkpoint's, changed by `arguments`.
        arguments (`dict`): The caller's keyword arguments of `from_pretrained`.

    Returns:
        The checkpoint's configuration; the one to build the model with, whose layers are those of the checkpoint; and
        the arguments that are left for the model.
    """
    kept = {name: arguments[name] for name in _HUB_ARGUMENTS if name in arguments}
    if isinstance(config, LambdaViTConfig):
        # What the config already says about attention was the caller's choice: see `LambdaViTConfig.from_dict`.
        attention = {"attn_implementation": arguments.get("attn_implementation") or config._attn_implementation}
        stored = LambdaViTConfig.from_pretrained(source, **attention, **kept)
        config = copy.deepcopy(config)
        for name in ("attention_flags", "fold_removed", "fold_exponent"):
            setattr(config, name, getattr(stored, name))
        return stored, config, arguments
    kept.update({name: arguments[name] for name in ("dtype", "torch_dtype") if name in arguments})
    stored, unused = LambdaViTConfig.from_pretrained(source, return_unused_kwargs=True, **arguments)
    return stored, copy.deepcopy(stored), {**unused, **kept}


def removal_to_do(
    stored: LambdaViTConfig,
    attention_flags: list[bool] | None = None,
    removed_layers: list[int] | None = None,
    fold_removed: bool | None = None,
) -> dict:
    """
    What is left to do after a checkpoint was loaded as it is stored.

    Args:
        stored (`LambdaViTConfig`): The checkpoint's configuration.
        attention_flags (`list[bool]`, *optional*): What is wanted, one flag per layer; by default what is stored.
        removed_layers (`list[int]`, *optional*): The same by 0-based indices; those removed already may be left out.
        fold_removed (`bool`, *optional*): Whether the result is wanted folded; by default as it is stored.

    Returns:
        `dict`: `"layers"`, the 0-based indices still to remove, and `"fold_removed"` as given.

    Raises:
        ValueError: if the flags do not fit, or ask for attention or for an unfolding that the checkpoint cannot give.
    """
    goal = copy.deepcopy(stored)
    if removed_layers is not None:
        if attention_flags is not None:
            raise ValueError("Give `attention_flags` or `removed_layers`, not both.")
        removed = {*check_layer_indices(removed_layers, stored.num_hidden_layers), *stored.removed_layers}
        attention_flags = [index not in removed for index in range(stored.num_hidden_layers)]
    goal.attention_flags = stored.attention_flags if attention_flags is None else attention_flags
    goal.validate()
    missing = sorted(set(stored.removed_layers) - set(goal.removed_layers))
    if missing:
        raise ValueError(f"`attention_flags` asks for attention in layers {missing}, which the checkpoint has not.")
    if stored.fold_removed and stored.removed_layers and fold_removed is False:
        raise ValueError("The checkpoint is folded; it cannot be loaded with `fold_removed=False`.")
    return {"layers": sorted(set(goal.removed_layers) - set(stored.removed_layers)), "fold_removed": fold_removed}


def check_finished(attention_lambdas: list[float | None]) -> None:
    """ValueError where lambda is not 1 in a layer that has attention: such a model is not to be published."""
    unfinished = {layer: value for layer, value in enumerate(attention_lambdas) if value not in (None, 1.0)}
    if unfinished:
        raise ValueError(f"Nothing was pushed: lambda is not 1 in layers {unfinished}. Train on, or remove them.")


def check_loaded_weights(config: LambdaViTConfig, info: dict, source: str) -> None:
    """
    Refuse a load that left an encoder weight random, or lost one.

    Args:
        config (`LambdaViTConfig`): Configuration of the loaded model.
        info (`dict`): What `from_pretrained(..., output_loading_info=True)` reports.
        source (`str`): Folder or repository, for the message.

    Raises:
        ValueError: if a weight of the encoder is missing, has another shape, or has no place in the model.
    """

    def of_encoder(keys):
        return sorted(key for key in keys if key.removeprefix("vit.").startswith(_ENCODER_KEYS))

    problems = {
        "not in the checkpoint (they would stay random)": of_encoder(info["missing_keys"]),
        "in the checkpoint, but not in the model (they would be lost)": of_encoder(info["unexpected_keys"]),
        "of another shape": of_encoder(key for key, *_ in info["mismatched_keys"]),
    }
    lines = [f"- {len(keys)} {what}: {', '.join(keys[:4])}, ..." for what, keys in problems.items() if keys]
    if lines:
        raise ValueError(
            f"The weights of {source} do not fit its configuration (attention removed in layers"
            f" {config.removed_layers} of {config.num_hidden_layers}):\n" + "\n".join(lines) + "\nIf the file is"
            " whole, its config.json is another model's. To start from a full checkpoint with layers removed, pass"
            " `attention_flags=` to `from_pretrained`."
        )


def resize_position_embeddings(position_embeddings: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """
    Resample position embeddings to another grid of patches: bicubic, antialiased, class token untouched.

    Args:
        position_embeddings (`torch.Tensor` of shape `(1, 1 + side * side, hidden)`): class token, then a square.
        grid (`tuple[int, int]`): patches per column and per row, (height, width).

    Returns:
        `torch.Tensor` of shape `(1, 1 + height * width, hidden)`; the argument itself if the grid is the same.

    Raises:
        ValueError: if the patches do not form a square.

    Source: the rule of `timm.layers.resample_abs_pos_embed`.
    """
    side = square_side(position_embeddings)
    if tuple(grid) == (side, side):
        return position_embeddings
    class_token, patches = position_embeddings[:, :1], position_embeddings[:, 1:]
    patches = patches.float().unflatten(1, (side, side)).permute(0, 3, 1, 2)
    patches = nn.functional.interpolate(patches, tuple(grid), mode="bicubic", align_corners=False, antialias=True)
    return torch.cat([class_token, patches.permute(0, 2, 3, 1).flatten(1, 2).to(class_token.dtype)], dim=1)


def set_image_size(embeddings: nn.Module, config: LambdaViTConfig, image_size: int | tuple[int, int]) -> None:
    """Fit the embeddings of a ViT and its configuration to images of another height and width, in pixels."""
    grid = patch_grid(image_size, config.patch_size)
    positions = embeddings.position_embeddings
    resized = resize_position_embeddings(positions.detach(), grid)
    embeddings.position_embeddings = nn.Parameter(resized, requires_grad=positions.requires_grad)
    embeddings.patch_embeddings.num_patches = grid[0] * grid[1]
    config.image_size = image_size
    height_and_width = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
    embeddings.image_size = embeddings.patch_embeddings.image_size = height_and_width


def square_side(position_embeddings: torch.Tensor) -> int:
    """Patches per side, from position embeddings `(1, 1 + side * side, hidden)`."""
    num_patches = position_embeddings.shape[1] - 1
    side = math.isqrt(num_patches)
    if side < 1 or side * side != num_patches:
        raise ValueError(
            f"Position embeddings of shape {tuple(position_embeddings.shape)} are not those of a class token and a"
            " square of patches. LambdaViT reads models trained on square images, with one position per token."
        )
    return side


def patch_grid(image_size: int | tuple[int, int], patch_size: int) -> tuple[int, int]:
    """Patches per column and per row. ValueError where `image_size` is no one or two multiples of `patch_size`."""
    sizes = tuple(image_size) if isinstance(image_size, (list, tuple)) else (image_size, image_size)
    if len(sizes) != 2 or not all(type(size) is int and size > 0 and size % patch_size == 0 for size in sizes):
        raise ValueError(f"`image_size` must be one or two multiples of the patch size {patch_size}: {image_size!r}.")
    return sizes[0] // patch_size, sizes[1] // patch_size
