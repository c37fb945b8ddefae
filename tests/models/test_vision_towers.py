"""The vision tower of a model of images and texts: taken out, thinned, and put back."""

import copy

import pytest
import torch
import transformers

from lambda_vit_hf import AutoLambdaModel
from tests.models.test_families import REMOVED, trained_looking, whole


TOKENS = torch.tensor([[3, 4, 5, 49], [7, 8, 9, 49]])


@torch.no_grad()
def embeddings(pair, pixel_values):
    """Of images as the model gives them, and what it makes of images and texts together."""
    outputs = pair(input_ids=TOKENS, pixel_values=pixel_values)
    images = pair.get_image_features(pixel_values=pixel_values)
    return [
        images if torch.is_tensor(images) else images.pooler_output,
        outputs.image_embeds,
        outputs.logits_per_image,
    ]


@pytest.mark.parametrize("name", ["CLIP", "Siglip"])
def test_the_removed_tower_is_put_back_into_the_whole_model(name, pixel_values, tmp_path):
    torch.manual_seed(0)
    config = whole(name).config
    config.text_config.projection_size = config.vision_config.hidden_size  # of SigLIP's texts
    pair = trained_looking(getattr(transformers, f"{name}Model")(config))
    pair.save_pretrained(tmp_path / "pair")
    expected = embeddings(pair, pixel_values)

    tower = AutoLambdaModel.from_pretrained(tmp_path / "pair")
    pair.vision_model = tower
    assert all(torch.equal(one, other) for one, other in zip(embeddings(pair, pixel_values), expected, strict=True))
    tower.remove_attention(REMOVED)
    unfolded = embeddings(pair, pixel_values)
    assert not torch.equal(unfolded[0], expected[0])
    smaller = copy.deepcopy(tower)
    smaller.fold_removed_attention()
    smaller.save_pretrained(tmp_path / "smaller")

    again = getattr(transformers, f"{name}Model").from_pretrained(tmp_path / "pair").eval()
    again.vision_model = AutoLambdaModel.from_pretrained(tmp_path / "smaller")
    assert all(torch.equal(one, other) for one, other in zip(embeddings(again, pixel_values), unfolded, strict=True))
