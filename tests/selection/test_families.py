"""NOSE on every family: what is measured with layers masked is what a model with these layers skipped gives."""

import pytest
import torch

from lambda_vit_hf import AutoLambdaModel, AutoLambdaModelForImageClassification, select_attention_layers
from lambda_vit_hf.selection.masked_forward import MaskedForward
from tests.models.test_families import BARE, CLASSIFIERS, trained_looking, whole


MODELS = {
    **{name: (AutoLambdaModel, make) for name, make in BARE.items()},
    **{f"{name}, classifier": (AutoLambdaModelForImageClassification, make) for name, make in CLASSIFIERS.items()},
    "dinov3_vit, classifier": (AutoLambdaModelForImageClassification, BARE["dinov3_vit"]),
    "siglip, classifier": (AutoLambdaModelForImageClassification, lambda: whole("Siglip")),
    "clip, classifier": (AutoLambdaModelForImageClassification, lambda: whole("CLIP")),
}
IMAGES = torch.randn(12, 3, 16, 16, generator=torch.Generator().manual_seed(5))


@pytest.fixture(params=MODELS)
def model(request, tmp_path):
    auto_class, make = MODELS[request.param]
    torch.manual_seed(0)
    trained_looking(make()).save_pretrained(tmp_path)
    model = auto_class.from_pretrained(tmp_path)
    model.newly_initialized_head = False
    return model.eval()


def outputs_of(model, layers, mask):
    """`output` by name, by the model's own forward, with some attentions taken out by hooks."""
    hooks = []
    for index in layers:
        layer = model.encoder_layers[index]
        factor = 2 if mask == "identity" else 1
        mix = layer.mix_tokens
        layer.mix_tokens = lambda hidden_states, *args, factor=factor, **kwargs: factor * hidden_states
        hooks.append((layer, mix))
    with torch.no_grad():
        found = model(IMAGES)
        tokens = (found if hasattr(found, "last_hidden_state") else model.base_model(IMAGES)).last_hidden_state
    for layer, mix in hooks:
        layer.mix_tokens = mix
    if "clip" in model.config.model_type:
        tokens = model.base_model.post_layernorm(tokens)
    return {"class_head": found.get("logits"), "class_token": model.pool(tokens), "token_mean": tokens.mean(dim=1)}


@pytest.mark.parametrize("mask", ["skip", "identity"])
@torch.no_grad()
def test_masked_outputs_are_those_of_the_model_without_these_layers(model, mask):
    sets = [[], [0], [1, 4], [5], [3, 4, 5]]
    names = ["class_token", "token_mean"] + ["class_head"] * hasattr(model, "classify") * hasattr(model, "num_labels")
    for name in names:
        found = MaskedForward(model, name, mask)(IMAGES, sets)
        for positions, output in found:
            expected = outputs_of(model, sets[positions[0]], mask)[name]
            torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4)


def test_nose_chooses_layers_and_leaves_the_model_as_it_was(model):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    selection = select_attention_layers(model, IMAGES, num_removed_layers=2, disable_tqdm=True)
    assert len(selection.layers) == 2 and len(selection.steps) == 2
    assert selection.output == ("class_head" if hasattr(model, "num_labels") else "class_token")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(value is not None for value in selection.attention_entropy)
