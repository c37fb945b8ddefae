"""Images of another size: the grid of patches they make, and position embeddings resampled to it."""

import math

import torch
from torch import nn


def as_pair(size: int | list[int] | tuple[int, int]) -> tuple[int, int]:
    """Height and width from one number or two, as transformers' configurations give them."""
    return tuple(size) if isinstance(size, (list, tuple)) else (size, size)


def stored_grid(image_size, patch_size) -> tuple[int, int]:
    """Patches per column and per row of a model; pixels that fill no patch are left out, as by its convolution."""
    return tuple(pixels // patch for pixels, patch in zip(as_pair(image_size), as_pair(patch_size), strict=True))


def patch_grid(image_size, patch_size) -> tuple[int, int]:
    """
    Patches per column and per row, of an image size that somebody asks for.

    Args:
        image_size (`int` or `tuple[int, int]`): height and width in pixels.
        patch_size (`int` or `tuple[int, int]`): height and width of a patch in pixels.

    Raises:
        ValueError: if a side is not a positive multiple of the patch's.
    """
    sizes, patches = as_pair(image_size), as_pair(patch_size)
    if len(sizes) != 2 or not all(
        type(size) is int and size > 0 and size % patch == 0 for size, patch in zip(sizes, patches, strict=False)
    ):
        raise ValueError(f"`image_size` must be one or two multiples of the patch size {patch_size}: {image_size!r}.")
    return stored_grid(sizes, patches)


def square_grid(num_patches: int) -> tuple[int, int]:
    """
    The square of a number of patches.

    Raises:
        ValueError: if it is no square number.
    """
    side = math.isqrt(max(num_patches, 0))
    if side < 1 or side * side != num_patches:
        raise ValueError(f"{num_patches} patches do not form a square: the size of the images must be given.")
    return side, side


def resize_position_embeddings(
    position_embeddings: torch.Tensor,
    grid: tuple[int, int],
    stored: tuple[int, int] | None = None,
    num_prefix_tokens: int = 1,
) -> torch.Tensor:
    """
    Resample position embeddings to another grid of patches: bicubic, antialiased, class token untouched.

    Args:
        position_embeddings (`torch.Tensor` of shape `(1, prefix tokens + patches, hidden)`): row by row.
        grid (`tuple[int, int]`): patches per column and per row that are wanted, (height, width).
        stored (`tuple[int, int]`, *optional*): the same of what is given. Defaults to a square.
        num_prefix_tokens (`int`, *optional*, defaults to 1): tokens in front that have no place in the image.

    Returns:
        `torch.Tensor` of shape `(1, prefix tokens + height * width, hidden)`; the argument itself if the grid is the
        same.

    Raises:
        ValueError: if the number of positions does not fit `stored`, or, without it, is no square.

    Source: the rule of `timm.layers.resample_abs_pos_embed`.
    """
    num_patches = position_embeddings.shape[1] - num_prefix_tokens
    stored = square_grid(num_patches) if stored is None else tuple(stored)
    if stored[0] * stored[1] != num_patches:
        raise ValueError(
            f"There are {num_patches} position embeddings of patches, but a grid of {stored[0]} x {stored[1]} has"
            f" {stored[0] * stored[1]}."
        )
    if tuple(grid) == stored:
        return position_embeddings
    prefix, patches = position_embeddings.split([num_prefix_tokens, num_patches], dim=1)
    patches = patches.float().unflatten(1, stored).permute(0, 3, 1, 2)
    patches = nn.functional.interpolate(patches, tuple(grid), mode="bicubic", align_corners=False, antialias=True)
    return torch.cat([prefix, patches.permute(0, 2, 3, 1).flatten(1, 2).to(prefix.dtype)], dim=1)


def set_image_size(embeddings: nn.Module, config, image_size: int | tuple[int, int]) -> None:
    """
    Fit the embeddings of a ViT and its configuration to images of another height and width, in pixels.

    Raises:
        ValueError: if a side is no multiple of the patch size. Nothing is changed then.
    """
    grid, positions = patch_grid(image_size, config.patch_size), embeddings.position_embeddings
    stored = stored_grid(config.image_size, config.patch_size)
    num_prefix_tokens = positions.shape[1] - stored[0] * stored[1]
    resized = resize_position_embeddings(positions.detach(), grid, stored, num_prefix_tokens)
    embeddings.position_embeddings = nn.Parameter(resized, requires_grad=positions.requires_grad)
    embeddings.patch_embeddings.num_patches = grid[0] * grid[1]
    config.image_size = image_size if isinstance(image_size, int) else list(image_size)
    embeddings.image_size = embeddings.patch_embeddings.image_size = as_pair(image_size)


@torch.no_grad()
def use_interpolated_positions(embeddings: nn.Module, config, image_size: int) -> None:
    """
    Store, for square images of another size, the position embeddings that a family's own `interpolate_pos_encoding`
    makes at every call.

    Raises:
        ValueError: if a side is no multiple of the patch size, or the sides differ: such a family takes what it has
            stored for a square. Nothing is changed then.
    """
    height, width = patch_grid(image_size, config.patch_size)
    sides = as_pair(image_size)
    if sides[0] != sides[1] or height != width:
        raise ValueError(f"{type(embeddings).__name__} stores positions of square images, got {image_size!r}.")
    positions = embeddings.position_embeddings
    num_prefix_tokens = positions.shape[1] - math.prod(stored_grid(config.image_size, config.patch_size))
    tokens = positions.new_zeros(1, num_prefix_tokens + height * width, positions.shape[-1])
    resized = embeddings.interpolate_pos_encoding(tokens, *sides)
    embeddings.position_embeddings = nn.Parameter(resized.clone(), requires_grad=positions.requires_grad)
    embeddings.patch_embeddings.num_patches = height * width
    embeddings.patch_embeddings.image_size = sides
    config.image_size = sides[0]


@torch.no_grad()
def use_interpolated_position_table(embeddings: nn.Module, config, image_size: int) -> None:
    """As [`use_interpolated_positions`], for towers that keep their positions in an `nn.Embedding`."""
    height, width = patch_grid(image_size, config.patch_size)
    sides, table = as_pair(image_size), embeddings.position_embedding
    if sides[0] != sides[1] or height != width:
        raise ValueError(f"{type(embeddings).__name__} stores positions of square images, got {image_size!r}.")
    num_special = table.num_embeddings - math.prod(stored_grid(config.image_size, config.patch_size))
    tokens = table.weight.new_zeros(1, num_special + height * width, table.embedding_dim)
    resized = embeddings.interpolate_pos_encoding(tokens, *sides)[0]
    table.weight = nn.Parameter(resized.clone(), requires_grad=table.weight.requires_grad)
    table.num_embeddings = embeddings.num_positions = len(resized)
    embeddings.num_patches, embeddings.image_size = height * width, sides[0]
    embeddings.position_ids = torch.arange(len(resized), device=resized.device).expand(1, -1)
    config.image_size = sides[0]


def note_image_size(embeddings: nn.Module, config, image_size: int | tuple[int, int]) -> None:
    """For families whose positions are computed for each image: only the configuration is told, checked as always."""
    patch_grid(image_size, config.patch_size)
    config.image_size = image_size if isinstance(image_size, int) else list(image_size)
