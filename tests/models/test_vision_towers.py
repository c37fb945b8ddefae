"""The vision tower of a model of images and texts: taken out, thinned, and put back."""

import copy
import json

import pytest
import torch
import transformers

from lambda_vit_hf import AutoLambdaModel
from tests.models.test_families import REMOVED, WITH_MLP, features, tower, trained_looking, whole


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


def test_a_tower_with_its_projection_gives_the_tower(pixel_values, tmp_path):
    torch.manual_seed(0)
    config = transformers.CLIPVisionConfig(**WITH_MLP, projection_dim=8)
    theirs = trained_looking(transformers.CLIPVisionModelWithProjection(config))
    theirs.save_pretrained(tmp_path)
    model = AutoLambdaModel.from_pretrained(tmp_path)
    expected = features(theirs.vision_model, pixel_values)
    assert all(torch.equal(one, other) for one, other in zip(features(model, pixel_values), expected, strict=True))


def test_a_pooling_head_that_the_checkpoint_lacks_is_named(tmp_path):
    tower("Siglip", vision_use_head=False).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "vision_use_head": True}))
    with pytest.raises(ValueError, match=r"not in the checkpoint.*head\.attention"):
        AutoLambdaModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("model_type", ["clip_text_model", "siglip2_vision_model"])
def test_towers_of_no_family_name_the_families(model_type, tmp_path):
    transformers.AutoConfig.for_model(model_type).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"`{model_type}`.*`clip_vision_model`"):
        AutoLambdaModel.from_pretrained(tmp_path)
