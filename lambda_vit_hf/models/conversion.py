"""Reading timm's, DeiT's and the Lambda-ViT authors' checkpoints, exactly and without running their code.

These files hold a table of tensors under timm's names. Nothing in them says how many attention heads there are and, in
the authors' files, nothing but the file's name says which attention layers are removed.
Sources: timm `VisionTransformer`; what the files of facebookresearch/deit and sihaoevery/lambda_vit contain.
"""

import logging
import warnings
from pathlib import Path

import torch
from torch import nn

from .families import family_class
from .folding import check_layer_indices
from .image_size import patch_grid, resize_position_embeddings, square_grid
from .pretrained_model import LambdaPreTrainedModel
from .timm_layouts import LAYOUTS, TimmLayout
from .weight_files import read_state_dict


logger = logging.getLogger(__name__)

# The six files that the authors published; no other name says anything about layers.
_AUTHORS_FILES = {
    "base_01346.pth": [0, 1, 3, 4, 6], "base_013469.pth": [0, 1, 3, 4, 6, 9], "small_024.pth": [0, 2, 4],
    "small_0246.pth": [0, 2, 4, 6], "tiny_024.pth": [0, 2, 4], "tiny_0246.pth": [0, 2, 4, 6],
}  # fmt: skip
# Wider ViTs do not have 64 dimensions per head (ViT-H: 80, ViT-g: 88, ViT-G: 104), though 64 divides their width: a
# guess would load without complaint and compute something else.
_WIDEST_WITH_64_PER_HEAD = 1024

# Of what is read before each tensor's shape is compared with the model's.
_AXES = {"cls_token": 3, "pos_embed": 3, "reg_token": 3, "norm.weight": 1, "patch_embed.proj.weight": 4,
         "head.bias": 1, "blocks.0.mlp.fc1.weight": 2, "blocks.0.mlp.fc2.weight": 2}  # fmt: skip
# Some weights may share memory; a few bytes that stand for terabytes do not.
_MOST_SHARED = 10


def convert_checkpoint(
    path: str | Path,
    removed_layers: list[int] | None = None,
    fold: bool = True,
    num_attention_heads: int | None = None,
    image_size: int | tuple[int, int] | None = None,
    id2label: dict[int, str] | None = None,
    drop_head: bool = False,
    weights_key: str | None = None,
    stored_image_size: int | tuple[int, int] | None = None,
    layers_removed: list[int] | None = None,
    family: str = "vit",
    hidden_act: str | None = None,
) -> LambdaPreTrainedModel:
    r"""
    Build a LambdaViT from a timm, DeiT or Lambda-ViT checkpoint, or a model of another family from timm's: the same
    outputs up to rounding, in float32.

    The configuration is read off the tensors' shapes; `layer_norm_eps` is timm's. Every tensor of the file is used,
    and every weight of the model comes from the file. Nothing in a pickled file is run.

    Args:
        path (`str` or `Path`):
            A `.safetensors`, `.pth`, `.pt`, `.bin` or `.tar` file: a table of tensors, bare or under a top key
            `model`, `net`, `state_dict`, `model_ema` or `state_dict_ema`; names may have the prefix `module.`.
        removed_layers (`list[int]`, *optional*):
            0-based layers whose attention, still in the file, becomes the identity, as in the paper at lambda = 0.
            Defaults to what the name of one of the authors' files says (`base_01346.pth`: layers 0, 1, 3, 4 and 6),
            else to none. `[]`: none, whatever the name.
        fold (`bool`, *optional*, defaults to `True`):
            Absorb the doubling of removed layers in the weights that follow; the same function.
        num_attention_heads (`int`, *optional*):
            Defaults to 64 dimensions per head: true of ViT and DeiT up to width 1024. Required for other widths.
        image_size (`int` or `tuple[int, int]`, *optional*):
            Height and width in pixels to resize the position embeddings to. Defaults to the file's own.
        id2label (`dict[int, str]`, *optional*):
            Class names, one per row of the head. Defaults to `LABEL_0`, `LABEL_1`, ...
        drop_head (`bool`, *optional*, defaults to `False`):
            Leave the class head out: logits are the class token's features, `(batch, hidden)`. Required for files
            without a head; and for those with one of families whose own head reads other features than timm's (all
            but `"vit"` and `"deit"`).
        weights_key (`str`, *optional*):
            Which top key to read. Required for files with several, such as `model` and `model_ema`.
        stored_image_size (`int` or `tuple[int, int]`, *optional*):
            Height and width in pixels that the file's position embeddings are for. Defaults to a square. Required
            where they are not, or where `image_size` would make as many patches as the file has in another grid.
        layers_removed (`list[int]`, *optional*): the former name of `removed_layers`.
        family (`str`, *optional*, defaults to `"vit"`):
            Or `"deit"` (distilled: both heads), `"dinov2"`, `"dinov2_with_registers"`, `"dinov3_vit"`,
            `"siglip_vision"`, `"clip_vision"`: encoders without head.
        hidden_act (`str`, *optional*):
            Of the MLPs. Required for SigLIP (`"gelu"` or `"gelu_pytorch_tanh"`) and CLIP (`"gelu"` or `"quick_gelu"`):
            timm's models differ, and files do not say it.

    Raises:
        FileNotFoundError: if there is no such file.
        OSError: if the file is cut short or is not what its suffix says.
        ValueError: if a pickle asks for code; if an archive is compressed or its checksums do not fit; if a tensor is
            missing, unknown, of the wrong shape or not finite, or the tensors declare far more than the file has; if
            the model is distilled (two class tokens) and no `"deit"`; if an argument does not fit the file.

    Example:

    ```python
    convert_checkpoint("base_01346.pth").config.removed_layers  # [0, 1, 3, 4, 6]
    ```
    """
    if layers_removed is not None:
        warnings.warn("`layers_removed` is now called `removed_layers`.", FutureWarning, stacklevel=2)
        removed_layers = layers_removed
    if family not in LAYOUTS:
        raise ValueError(f"`family` must be one of {', '.join(LAYOUTS)}, got {family!r}.")
    layout, path = LAYOUTS[family], Path(path)
    tensors = read_state_dict(path, weights_key)
    if drop_head:
        heads = [f"{name}.{kind}" for name in (*layout.heads, "head") for kind in ("weight", "bias")]
        tensors = {name: tensor for name, tensor in tensors.items() if name not in heads}
    _check_tensors(tensors, layout, path)
    tensors = layout.arranged(tensors)
    names = _names_in_model(tensors, layout, path, has_head=not drop_head)
    hidden_size, num_channels, *patch_size = tensors["patch_embed.proj.weight"].shape
    stored = _stored_grid(tensors, layout, patch_size, image_size, stored_image_size, path)
    num_labels = tensors["head.bias"].numel() if layout.heads and not drop_head else 0
    if id2label is not None and set(id2label) != set(range(num_labels)):
        raise ValueError(f"`id2label` must map 0, 1, ... to {num_labels} class names ({path}): {str(id2label)[:99]}.")
    id2label = id2label or {index: f"LABEL_{index}" for index in range(num_labels)}
    of_head = {"id2label": id2label, "label2id": {label: index for index, label in id2label.items()}}
    config = family_class(f"lambda_{family}", "Config")(
        hidden_size=hidden_size,
        num_hidden_layers=sum(name.endswith(".attn.qkv.weight") for name in tensors),
        num_attention_heads=_num_heads(hidden_size, num_attention_heads, path),
        image_size=_smallest_form([side * patch for side, patch in zip(stored, patch_size, strict=True)]),
        patch_size=_smallest_form(patch_size),
        num_channels=num_channels,
        hidden_act=_activation(hidden_act, layout, family, tensors),
        **layout.config(tensors),
        **(of_head if layout.heads else {}),
    )
    removed_layers = _layers_in_name(path) if removed_layers is None and family == "vit" else removed_layers
    removed_layers = check_layer_indices(removed_layers or [], config.num_hidden_layers)
    # On the meta device nothing is drawn at random: a parameter that the file did not give would have no value at all.
    with torch.device("meta"):
        model = family_class(f"lambda_{family}", layout.kind)(config)
    model.load_state_dict(_renamed(tensors, names, model, path), strict=True, assign=True)
    _fill_buffers(model)
    if removed_layers:
        model.remove_attention(removed_layers)
        if fold:
            model.fold_removed_attention()
    if image_size is not None:
        model.set_image_size(image_size)
    return model.eval()


def _names_in_model(tensors: dict, layout: TimmLayout, path: Path, has_head: bool) -> dict[str, list[str]]:
    """timm's names and the parameters their rows go to; raises where the file has other names, or fewer."""
    if layout is LAYOUTS["vit"] and any(name == "dist_token" or name.startswith("head_dist.") for name in tensors):
        raise ValueError(
            f"{path} is a distilled DeiT, with a second class token and a second head (`dist_token`, `head_dist`)."
            ' LambdaViT has one of each. Pass `family="deit"`, or use the checkpoint without distillation, e.g.'
            " deit_base_patch16_224."
        )
    names = layout.names(tensors)
    if not has_head:
        names = {name: targets for name, targets in names.items() if name.rpartition(".")[0] not in layout.heads}
    problems = {"missing": [name for name in names if name not in tensors]}
    problems["unknown"] = [name for name in tensors if name not in names]
    if any(problems.values()):
        family = next(name for name, one in LAYOUTS.items() if one is layout)
        lines = [f"{len(keys)} {what}: {', '.join(keys[:8])}" for what, keys in problems.items() if keys]
        raise ValueError(
            f"The tensors in {path} are not those of timm's models of family {family!r}: {'; '.join(lines)}."
            f" `family=` names the others ({', '.join(LAYOUTS)}). Average pooling, norms of query and key and the like"
            " compute something else. A file without a class head, or with one that reads other features than the"
            " family's, needs `drop_head=True`; Hugging Face's names (`vit.`) go to `from_pretrained`."
        )
    return names


def _check_tensors(tensors: dict, layout: TimmLayout, path: Path) -> None:
    declared = sum(value.numel() * value.element_size() for value in tensors.values() if torch.is_tensor(value))
    if declared > _MOST_SHARED * path.stat().st_size:
        raise ValueError(
            f"{path} is refused: its tensors would take {declared:,} bytes, over {_MOST_SHARED} times what the file"
            " has. They repeat themselves by strides or share memory, as no trained weights do."
        )
    for name, value in tensors.items():
        dense = isinstance(value, torch.Tensor) and value.layout == torch.strided and value.device.type == "cpu"
        dense = dense and not value.is_nested  # which says that it is strided
        if not (dense and value.is_floating_point() and value.numel() and value.float().isfinite().all()):
            raise ValueError(f"{name} in {path} must be a dense floating-point tensor, not empty, without NaN or inf.")
    for name, axes in _AXES.items():
        is_read = name in tensors and (name in layout.tensors or "." in name)
        if is_read and tensors[name].ndim != axes:
            raise ValueError(f"{name} in {path} must have {axes} axes, got shape {tuple(tensors[name].shape)}.")


def _stored_grid(
    tensors: dict, layout: TimmLayout, patch_size: list[int], image_size, stored_image_size, path: Path
) -> tuple[int, int]:
    """Patches per column and per row that the file's position embeddings are for: said by the caller, or a square."""
    if layout.num_prefix_positions is None:  # of no grid in particular
        return patch_grid(stored_image_size or image_size or [14 * side for side in patch_size], patch_size)
    num_patches = tensors["pos_embed"].shape[-2] - layout.num_prefix_positions
    if stored_image_size is not None:
        grid = patch_grid(stored_image_size, patch_size)
        if grid[0] * grid[1] != num_patches:
            raise ValueError(
                f"{path} has {num_patches} position embeddings of patches, but `stored_image_size` {stored_image_size}"
                f" makes a grid of {grid[0]} x {grid[1]}."
            )
        return grid
    wanted = None if image_size is None else patch_grid(image_size, patch_size)
    if wanted is not None and wanted[0] * wanted[1] == num_patches and wanted[0] != wanted[1]:
        raise ValueError(
            f"{path} has {num_patches} positions, as many as `image_size` {image_size} makes patches"
            f" ({wanted[0]} x {wanted[1]}). Is it a model of such images, or one of squares to be resized? Say so by"
            " `stored_image_size`, in pixels."
        )
    try:
        return square_grid(num_patches)
    except ValueError as error:
        raise ValueError(f"{error} `stored_image_size`, in pixels, says what {path} was trained on.") from error


def _smallest_form(sizes: list[int]) -> int | list[int]:
    """One number for a square, as configurations have it."""
    return sizes[0] if sizes[0] == sizes[1] else list(sizes)


def _num_heads(width: int, wanted: int | None, path: Path) -> int:
    if wanted is None and width % 64 == 0 and width <= _WIDEST_WITH_64_PER_HEAD:
        return width // 64
    if type(wanted) is not int or wanted < 1 or width % wanted:
        raise ValueError(
            f"`num_attention_heads` must divide the width {width} of {path}, got {wanted!r}. The file does not tell"
            f" it, and width / 64 is sure only for multiples of 64 up to {_WIDEST_WITH_64_PER_HEAD} (ViT-H has 16)."
        )
    return wanted


def _activation(wanted: str | None, layout: TimmLayout, family: str, tensors: dict) -> str:
    if layout.hidden_act is None and wanted is None:
        raise ValueError(
            f"`hidden_act` is needed for {family!r}: timm's models differ, and the file does not say it. It is that of"
            ' `timm.create_model(NAME).blocks[0].mlp.act`: "gelu", "gelu_pytorch_tanh" or "quick_gelu".'
        )
    return wanted or ("silu" if layout.is_gated(tensors) else layout.hidden_act)


def _layers_in_name(path: Path) -> list[int]:
    layers = _AUTHORS_FILES.get(path.name, [])
    if layers:
        # A warning: another file of such a name would lose layers that its owner wants to keep.
        logger.warning("%s: removing the attention of layers %s, as the file's name says.", path, layers)
    return layers


def _renamed(tensors: dict, names: dict[str, list[str]], model: nn.Module, path: Path) -> dict[str, torch.Tensor]:
    """The model's state dict in float32, each tensor with memory of its own; raises where a shape does not fit."""
    expected = model.state_dict()
    renamed = {name: torch.ones(()) for name in expected if name.endswith(".attention_lambda")}
    # Of a training with masked patches, which no file of timm has.
    masks = [name for name in expected if name.endswith("embeddings.mask_token")]
    renamed |= {name: torch.zeros(expected[name].shape) for name in masks}
    for source, targets in names.items():
        rows, *rest = expected[targets[0]].shape
        shape = (rows * len(targets), *rest)
        if tensors[source].shape != shape:
            raise ValueError(f"{source} in {path} must have shape {shape}, got {tuple(tensors[source].shape)}.")
        for target, part in zip(targets, tensors[source].chunk(len(targets)), strict=True):
            renamed[target] = part.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    return renamed


def _fill_buffers(model: LambdaPreTrainedModel) -> None:
    """Give values to what no file stores (frequencies of RoPE, indices of positions), as transformers does on load."""
    for module in model.modules():
        empty = [name for name, buffer in module.named_buffers(recurse=False) if buffer.is_meta]
        for name in empty:
            setattr(module, name, torch.empty_like(getattr(module, name), device="cpu"))
        if empty:
            for parameter in module.parameters():
                parameter._is_hf_initialized = True  # so that only the buffers are set
            model._init_weights(module)


__all__ = ["convert_checkpoint", "resize_position_embeddings"]
