"""The grid of patches is known from image and patch size, never guessed from the number of positions."""

import numpy as np
import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from transformers import ViTConfig, ViTForImageClassification

from lambda_vit_hf import LambdaViTConfig, LambdaViTForImageClassification
from lambda_vit_hf.models.conversion import convert_checkpoint
from lambda_vit_hf.models.image_size import patch_grid, resize_position_embeddings
from tests.conftest import TINY, perturb


def resampled(positions, stored, wanted):
    """Bicubic, antialiased, written out."""
    patches = positions[0, 1:].reshape(*stored, -1).permute(2, 0, 1)[None]
    patches = nn.functional.interpolate(patches, wanted, mode="bicubic", antialias=True, align_corners=False)
    return torch.cat([positions[:, :1], patches[0].flatten(1).T[None]], dim=1)


def model_of(image_size, patch_size):
    torch.manual_seed(0)
    config = LambdaViTConfig(**{**TINY, "image_size": image_size, "patch_size": patch_size})
    return perturb(LambdaViTForImageClassification(config))


@pytest.mark.parametrize(
    ("image_size", "patch_size", "wanted", "stored", "grid"),
    [
        ([8, 32], 4, 32, (2, 8), (8, 8)),  # as many positions as a square of 4 x 4
        ([32, 8], 4, [16, 24], (8, 2), (4, 6)),
        (16, [4, 4], 32, (4, 4), (8, 8)),
        (16, [4, 8], [16, 16], (4, 2), (4, 2)),
        ([16, 16], (2, 4), 32, (8, 4), (16, 8)),
        (10, 4, 16, (2, 2), (4, 4)),  # two pixels fill no patch
        ([10, 18], 4, [8, 16], (2, 4), (2, 4)),
    ],
)
def test_positions_are_resampled_from_the_grid_of_the_config(image_size, patch_size, wanted, stored, grid):
    model = model_of(image_size, patch_size)
    positions = model.vit.embeddings.position_embeddings.detach().clone()
    model.set_image_size(wanted)
    expected = positions if grid == stored else resampled(positions, stored, grid)
    torch.testing.assert_close(model.vit.embeddings.position_embeddings, expected)
    height, width = (wanted, wanted) if isinstance(wanted, int) else wanted
    assert model(torch.zeros(1, 3, height, width)).logits.shape == (1, 5)


def test_a_model_of_wide_images_loads_and_is_resized_like_any_other(tmp_path):
    torch.manual_seed(0)
    vit = perturb(ViTForImageClassification(ViTConfig(**{**TINY, "image_size": [8, 32]})))
    vit.save_pretrained(tmp_path)
    model = LambdaViTForImageClassification.from_pretrained(tmp_path, image_size=32)
    expected = resampled(vit.vit.embeddings.position_embeddings.detach(), (2, 8), (8, 8))
    torch.testing.assert_close(model.vit.embeddings.position_embeddings, expected)
    model.save_pretrained(tmp_path / "again")
    again = LambdaViTForImageClassification.from_pretrained(tmp_path / "again")
    assert again.config.image_size == 32


@pytest.mark.parametrize("wanted", [10, [16, 10], 0, -4, 16.0, "16", True, [16], [16, 16, 16], None])
def test_a_size_that_leaves_pixels_over_is_refused_and_changes_nothing(wanted):
    model = model_of(16, 4)
    positions = model.vit.embeddings.position_embeddings
    with pytest.raises(ValueError, match="multiples of the patch size"):
        model.set_image_size(wanted)
    assert model.config.image_size == 16
    assert model.vit.embeddings.position_embeddings is positions


@pytest.mark.parametrize("size", [np.int64(24), (np.int64(24), 16), np.array([24, 16])], ids=str)
def test_a_size_in_numpys_numbers_is_saved_as_plain_ones(model, tmp_path, size):
    model.set_image_size(size)
    model.save_pretrained(tmp_path)
    assert LambdaViTForImageClassification.from_pretrained(tmp_path).config.image_size == np.asarray(size).tolist()


@pytest.mark.parametrize(("image_size", "patch_size"), [(0, 4), (16, 0), (-16, 4), ([16, 0], 4), ([16], 4)])
def test_sizes_that_are_none_are_refused_by_the_config(image_size, patch_size):
    with pytest.raises(Exception, match="positive numbers of pixels"):
        LambdaViTConfig(image_size=image_size, patch_size=patch_size)


def test_a_patch_grid_takes_sides_of_their_own():
    assert patch_grid((32, 24), [8, 4]) == (4, 6)


def test_positions_that_do_not_fit_the_grid_are_refused():
    with pytest.raises(ValueError, match="16 position embeddings"):
        resize_position_embeddings(torch.zeros(1, 17, 4), (4, 4), stored=(3, 5))
    with pytest.raises(ValueError, match="square"):
        resize_position_embeddings(torch.zeros(1, 19, 4), (4, 4))


def wide_file(tmp_path):
    """timm's names; 2 x 8 patches of 4 pixels, which could as well be a square of 4 x 4."""
    torch.manual_seed(0)
    vit = VisionTransformer(
        img_size=(8, 32), patch_size=4, embed_dim=64, depth=2, num_heads=1, mlp_ratio=2, num_classes=5
    )
    torch.save(perturb(vit).state_dict(), tmp_path / "vit.pth")
    return vit.eval(), tmp_path / "vit.pth"


@torch.no_grad()
def test_a_converted_model_of_wide_images_is_read_as_one_where_the_caller_says_so(tmp_path):
    vit, path = wide_file(tmp_path)
    images = torch.randn(2, 3, 8, 32)
    model = convert_checkpoint(path, stored_image_size=(8, 32))
    torch.testing.assert_close(model(images).logits, vit(images), rtol=0, atol=1e-5)
    assert model.config.image_size == [8, 32]
    larger = convert_checkpoint(path, stored_image_size=(8, 32), image_size=(16, 32))
    positions = resampled(vit.pos_embed, (2, 8), (4, 8))
    torch.testing.assert_close(larger.vit.embeddings.position_embeddings, positions)


def test_a_conversion_that_could_mean_two_grids_is_refused(tmp_path):
    _, path = wide_file(tmp_path)
    with pytest.raises(ValueError, match="stored_image_size"):
        convert_checkpoint(path, image_size=(8, 32))
    with pytest.raises(ValueError, match="16 position embeddings"):
        convert_checkpoint(path, stored_image_size=(8, 24))
