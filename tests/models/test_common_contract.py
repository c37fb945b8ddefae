"""What transformers' own tests ask of a model like ViT, of every family; of LambdaViT more in test_modeling.py."""

import copy
import inspect

import pytest
import torch
import transformers
from transformers import AutoModelForImageClassification

from lambda_vit_hf import AutoLambdaModelForImageClassification
from tests.conftest import checkpoint_activations
from tests.models.test_families import BARE, CLASSIFIERS, trained_looking


FAMILIES = [name for name in BARE if "," not in name] + ["deit, both heads"]


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request, tmp_path_factory):
    """A classifier that is half-way: two layers removed and folded, one off, one diluting, two whole."""
    folder = tmp_path_factory.mktemp("family")
    torch.manual_seed(0)
    trained_looking({**BARE, **CLASSIFIERS}[request.param]()).save_pretrained(folder / "source")
    model = AutoLambdaModelForImageClassification.from_pretrained(folder / "source", num_labels=5)
    model.remove_attention([0, 2])
    model.fold_removed_attention()
    model.set_attention_lambda(0.0, [1])
    model.set_attention_lambda(0.25, [4])
    model.save_pretrained(folder / "model")
    return folder / "model"


@pytest.fixture
def model(folder):
    return AutoModelForImageClassification.from_pretrained(folder)


@torch.no_grad()
def logits(model, pixel_values):
    return model(pixel_values).logits


def test_forward_takes_what_transformers_class_takes(model):
    ours = inspect.signature(model.forward).parameters
    assert next(iter(ours)) == "pixel_values"
    theirs = getattr(transformers, type(model).__name__.removeprefix("Lambda").replace("Vision", ""), None)
    if theirs is not None:  # DINOv3 has no classifier there
        named = {name for name, one in inspect.signature(theirs.forward).parameters.items()
                 if one.kind is not inspect.Parameter.VAR_KEYWORD and name != "self"}  # fmt: skip
        assert named <= set(ours) or any(one.kind is inspect.Parameter.VAR_KEYWORD for one in ours.values())


def test_what_is_saved_is_what_is_loaded(model, pixel_values, tmp_path):
    expected = logits(model, pixel_values)
    assert model.attention_lambdas == [None, 0.0, None, 1.0, 0.25, 1.0]
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    again = AutoLambdaModelForImageClassification.from_pretrained(tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert again.attention_lambdas == model.attention_lambdas
    assert torch.equal(logits(again, pixel_values), expected)


def test_outputs_are_the_same_as_a_tuple(model, pixel_values):
    asked = {"output_hidden_states": True, "output_attentions": True}
    model.set_attn_implementation("eager")
    with torch.no_grad():
        named, plain = model(pixel_values, **asked), model(pixel_values, **asked, return_dict=False)
    *logits, states, maps = plain
    assert all(torch.equal(one, other) for one, other in zip(named.to_tuple(), logits, strict=False))
    assert len(named.hidden_states) == 7 and all(one.shape[-1] == 32 for one in named.hidden_states)
    assert [one.shape[1] for one in named.attentions] == [4] * 3, "one map of 4 heads for each attention computed"
    for one, other in ((named.hidden_states, states), (named.attentions, maps)):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_sdpa_gives_what_eager_gives(model, pixel_values):
    model.set_attn_implementation("eager")
    expected = logits(model, pixel_values)
    model.set_attn_implementation("sdpa")
    torch.testing.assert_close(logits(model, pixel_values), expected, rtol=1e-4, atol=1e-4)


def test_gradient_checkpointing_gives_the_same_gradients(model, pixel_values):
    gradients = []
    for checkpointing in (False, True):
        one = copy.deepcopy(model).train()
        if checkpointing:
            checkpoint_activations(one, use_reentrant=False)
        outputs = one(pixel_values, labels=torch.tensor([0, 1, 2])) if has_loss(one) else one(pixel_values)
        (outputs.loss if has_loss(one) else outputs.logits.square().mean()).backward()
        gradients.append({name: p.grad for name, p in one.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() and len(gradients[0]) > 20
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])
    # Attention that is off learns nothing; the other layers and what stands around them do.
    assert not [name for name in gradients[0] if ".1.self_attn" in name or ".1.attention." in name]


def has_loss(model) -> bool:
    """DeiT with both heads is for inference in transformers: it takes no labels."""
    return "labels" in inspect.signature(model.forward).parameters


def test_a_compiled_model_without_graph_breaks_gives_the_same(model, pixel_values):
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(logits(compiled, pixel_values), logits(model, pixel_values))
    torch.compiler.reset()


def test_torch_export_gives_the_same_logits_for_any_batch(model, pixel_values):
    shapes = {"pixel_values": {0: torch.export.Dim("batch")}}
    exported = torch.export.export(model, (), {"pixel_values": pixel_values[:2]}, dynamic_shapes=shapes).module()
    with torch.no_grad():
        found = exported(pixel_values=pixel_values).logits
    torch.testing.assert_close(found, logits(model, pixel_values))
