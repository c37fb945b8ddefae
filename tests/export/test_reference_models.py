"""The models to compare with compute the same function from the same weights."""

import copy

import pytest
import torch

from lambda_vit_hf import (
    LambdaDeiTForImageClassificationWithTeacher,
    LambdaDinov2Config,
    LambdaDinov2ForImageClassification,
    LambdaSiglipVisionForImageClassification,
)
from lambda_vit_hf.export.reference_models import PrunedTimmBlock, as_timm_vit, as_transformers_model
from tests.conftest import REMOVED, perturb


@torch.no_grad()
def test_transformers_vit_gives_the_logits_to_the_bit(model, pixel_values):
    model.eval()
    assert torch.equal(as_transformers_model(model)(pixel_values).logits, model(pixel_values).logits)


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
    for copied in (as_transformers_model(model), as_timm_vit(model)):
        with torch.no_grad():
            for parameter in copied.parameters():
                parameter.zero_()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@torch.no_grad()
@pytest.mark.parametrize("family", ["dinov2", "deit", "siglip_vision"])
def test_transformers_model_of_another_family_gives_the_logits_to_the_bit(family):
    ours = {"dinov2": LambdaDinov2ForImageClassification, "deit": LambdaDeiTForImageClassificationWithTeacher,
            "siglip_vision": LambdaSiglipVisionForImageClassification}[family]  # fmt: skip
    shape = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14)
    model = perturb(ours(ours.config_class(**shape, num_labels=3)))
    pixel_values = torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    if family == "siglip_vision":
        with pytest.raises(ValueError, match="no classifier with the modules of LambdaSiglipVision"):
            as_transformers_model(model)
        return
    reference = as_transformers_model(model)
    assert type(reference).__module__.startswith("transformers.")
    assert torch.equal(reference(pixel_values).logits, model(pixel_values).logits)


def test_timm_has_no_model_of_another_family():
    config = LambdaDinov2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28)
    with pytest.raises(ValueError, match="LambdaDinov2ForImageClassification is of another family"):
        as_timm_vit(LambdaDinov2ForImageClassification(config))


def test_forms_that_cannot_express_the_model_are_refused(removed):
    with pytest.raises(ValueError, match="transformers' models cannot leave out attention"):
        as_transformers_model(removed)
    with pytest.raises(ValueError, match="unfolded"):
        as_timm_vit(removed)
