"""The models to compare with compute the same function from the same weights."""

import copy

import pytest
import torch

from lambda_vit_hf import LambdaDinov2Config, LambdaDinov2ForImageClassification
from lambda_vit_hf.export.reference_models import PrunedTimmBlock, as_timm_vit, as_transformers_vit
from tests.conftest import REMOVED


@torch.no_grad()
def test_transformers_vit_gives_the_logits_to_the_bit(model, pixel_values):
    model.eval()
    assert torch.equal(as_transformers_vit(model)(pixel_values).logits, model(pixel_values).logits)


@torch.no_grad()
@pytest.mark.parametrize("layers", [[], REMOVED])
def test_timm_gives_the_same_logits(model, pixel_values, layers):
    model.eval()
    if layers:
        model.remove_attention(layers)
    timm_vit = as_timm_vit(model)
    assert [index for index, block in enumerate(timm_vit.blocks) if isinstance(block, PrunedTimmBlock)] == layers
    torch.testing.assert_close(timm_vit(pixel_values), model(pixel_values).logits)


def test_a_copy_does_not_share_weights(model, pixel_values):
    before = copy.deepcopy(model.state_dict())
    for copied in (as_transformers_vit(model), as_timm_vit(model)):
        with torch.no_grad():
            for parameter in copied.parameters():
                parameter.zero_()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("convert", [as_transformers_vit, as_timm_vit])
def test_a_model_of_another_family_is_refused(convert):
    config = LambdaDinov2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28)
    with pytest.raises(ValueError, match="LambdaDinov2ForImageClassification is of another family"):
        convert(LambdaDinov2ForImageClassification(config))


def test_forms_that_cannot_express_the_model_are_refused(removed):
    with pytest.raises(ValueError, match="transformers' ViT cannot leave out attention"):
        as_transformers_vit(removed)
    with pytest.raises(ValueError, match="unfolded"):
        as_timm_vit(removed)
