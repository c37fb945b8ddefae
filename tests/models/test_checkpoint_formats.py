"""Every checkpoint format, against the implementation that defines it: random weights, tiny and as wide as base."""

import argparse
import functools

import pytest
import timm
import torch
from safetensors.torch import save_file
from transformers import ViTConfig, ViTForImageClassification

from lambda_vit_hf import LambdaViTForImageClassification
from lambda_vit_hf.models.conversion import convert_checkpoint
from tests.conftest import perturb


# `base` has DeiT-B's layers, heads, width and pixels; its MLPs are thinner, for half of the time went into them.
SIZES = {
    "tiny": dict(image=32, patch=8, hidden=64, layers=6, heads=1, mlp=128, classes=7, images=3),
    "base": dict(image=224, patch=16, hidden=768, layers=12, heads=12, mlp=768, classes=1000, images=1),
}
REMOVED = {"tiny": [0, 3], "base": [0, 1, 3, 4, 6]}


@functools.cache
def transformers_vit(size: str) -> ViTForImageClassification:
    s = SIZES[size]
    torch.manual_seed(0)
    config = ViTConfig(
        image_size=s["image"], patch_size=s["patch"], hidden_size=s["hidden"], num_hidden_layers=s["layers"],
        num_attention_heads=s["heads"], intermediate_size=s["mlp"], num_labels=s["classes"],
    )  # fmt: skip
    return perturb(ViTForImageClassification(config), size=0.01)


@functools.cache
def timm_vit(size: str) -> torch.nn.Module:
    s = SIZES[size]
    torch.manual_seed(0)
    model = timm.models.VisionTransformer(
        img_size=s["image"], patch_size=s["patch"], embed_dim=s["hidden"], depth=s["layers"], num_heads=s["heads"],
        mlp_ratio=s["mlp"] / s["hidden"], num_classes=s["classes"],
    )  # fmt: skip
    return perturb(model, size=0.01)


def pruned_by_the_authors_formula(model, pixel_values, removed):
    """timm's modules in the authors' block: x = 2x where attention is removed, then the MLP."""
    x = model._pos_embed(model.patch_embed(pixel_values))
    for index, block in enumerate(model.blocks):
        x = 2 * x if index in removed else x + block.attn(block.norm1(x))
        x = x + block.mlp(block.norm2(x))
    return model.head(model.norm(x)[:, 0])


def hugging_face(size, folder, save_original_format):
    transformers_vit(size).save_pretrained(folder, save_original_format=save_original_format)
    return LambdaViTForImageClassification.from_pretrained(folder), transformers_vit(size)


def timm_safetensors(size, folder):
    save_file(timm_vit(size).state_dict(), folder / "model.safetensors")
    return convert_checkpoint(folder / "model.safetensors"), timm_vit(size)


def deit_pth(size, folder):
    torch.save({"model": timm_vit(size).state_dict(), "epoch": 3}, folder / "deit.pth")
    return convert_checkpoint(folder / "deit.pth"), timm_vit(size)


def authors_pth(size, folder, fold):
    removed = REMOVED[size]
    path = folder / "base_01346.pth" if removed == [0, 1, 3, 4, 6] else folder / "vit.pth"
    layers = None if path.name == "base_01346.pth" else removed  # else the file's name says them
    torch.save({"model": timm_vit(size).state_dict(), "args": argparse.Namespace(lr=5e-4)}, path)
    reference = functools.partial(pruned_by_the_authors_formula, timm_vit(size), removed=removed)
    return convert_checkpoint(path, layers, fold=fold), reference


FORMATS = {
    "Hugging Face, names of transformers 4": functools.partial(hugging_face, save_original_format=True),
    "Hugging Face, names of transformers 5": functools.partial(hugging_face, save_original_format=False),
    "timm, safetensors": timm_safetensors,
    "DeiT, pth under `model`": deit_pth,
    "the authors' removed layers, doubling kept": functools.partial(authors_pth, fold=False),
    "the authors' removed layers, folded": functools.partial(authors_pth, fold=True),
}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("form", FORMATS)
@torch.no_grad()
def test_logits_equal_the_reference_implementations(form, size, tmp_path):
    model, reference = FORMATS[form](size, tmp_path)
    s = SIZES[size]
    generator = torch.Generator().manual_seed(1)
    pixel_values = torch.randn(s["images"], 3, s["image"], s["image"], generator=generator)
    expected = reference(pixel_values)
    expected = getattr(expected, "logits", expected)
    torch.testing.assert_close(model.eval()(pixel_values).logits, expected, rtol=0, atol=1e-5)
    if "removed" in form:
        assert model.config.removed_layers == REMOVED[size]
