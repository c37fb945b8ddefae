"""One contract for every family: what transformers' class computes, whole; and one function, whatever is removed."""

import copy
from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoModel, AutoModelForImageClassification

import lambda_vit_hf
from lambda_vit_hf import AutoLambdaModel, AutoLambdaModelForImageClassification
from lambda_vit_hf.evaluation.classifier import load_classifier
from lambda_vit_hf.models.families import FAMILIES, family_class
from tests.conftest import perturb


SHAPE = dict(
    image_size=16, patch_size=4, hidden_size=32, num_hidden_layers=6, num_attention_heads=4, num_labels=5,
)  # fmt: skip
WITH_MLP = dict(**SHAPE, intermediate_size=64)
REMOVED = [0, 2, 5]


def tower(name, **more):
    config = getattr(transformers, f"{name}VisionConfig")(**WITH_MLP, **more)
    return getattr(transformers, f"{name}VisionModel")(config)


def whole(name, **more):
    """A model of images and texts."""
    text = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=50)
    config = getattr(transformers, f"{name}Config")(vision_config={**WITH_MLP, **more}, text_config=text)
    return getattr(transformers, f"{name}Model")(config)


def of(name, kind, config=None, **shape):
    config = getattr(transformers, f"{name}Config")(**(shape or WITH_MLP))
    return getattr(transformers, name + kind)(config)


REGISTERS = dict(**SHAPE, num_register_tokens=3)
V3 = dict(**WITH_MLP, num_register_tokens=3, key_bias=False, pos_embed_rescale=None)
# What a user has, and what its `last_hidden_state` and pooled features are compared with.
BARE = {
    "vit": lambda: of("ViT", "Model"),
    "deit": lambda: of("DeiT", "Model"),
    "dinov2": lambda: of("Dinov2", "Model", **SHAPE),
    "dinov2, gated": lambda: of("Dinov2", "Model", **SHAPE, use_swiglu_ffn=True),
    "dinov2_with_registers": lambda: of("Dinov2WithRegisters", "Model", **REGISTERS),
    "dinov3_vit": lambda: of("DINOv3ViT", "Model", **V3),
    "dinov3_vit, gated": lambda: of("DINOv3ViT", "Model", **V3, use_gated_mlp=True),
    "siglip_vision_model": lambda: tower("Siglip"),
    "siglip_vision_model, no head": lambda: tower("Siglip", vision_use_head=False),
    "clip_vision_model": lambda: tower("CLIP"),
}
CLASSIFIERS = {
    "vit": lambda: of("ViT", "ForImageClassification"),
    "deit": lambda: of("DeiT", "ForImageClassification"),
    "deit, both heads": lambda: of("DeiT", "ForImageClassificationWithTeacher"),
    "dinov2": lambda: of("Dinov2", "ForImageClassification", **SHAPE),
    "dinov2_with_registers": lambda: of("Dinov2WithRegisters", "ForImageClassification", **REGISTERS),
}


def trained_looking(model):
    """Weights moved from their start; LayerScale from 1e-5 to 7, as in a really trained DINOv2."""
    perturb(model)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("lambda1"):
                parameter.copy_(10 ** (6 * torch.rand(parameter.shape, generator=generator) - 5) * 0.7)
    return model.eval()


@pytest.fixture(params=BARE)
def bare(request):
    torch.manual_seed(0)
    return trained_looking(BARE[request.param]())


@pytest.fixture(params=CLASSIFIERS)
def classifier(request):
    torch.manual_seed(0)
    return trained_looking(CLASSIFIERS[request.param]())


def features(model, pixel_values, **kwargs):
    with torch.no_grad():
        output = model(pixel_values, **kwargs)
    return [value for value in (output.last_hidden_state, output.get("pooler_output")) if value is not None]


def equal(first, second):
    return len(first) == len(second) and all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("names", ["transformers 4", "transformers 5"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_with_all_attention_it_is_transformers_model_to_the_bit(bare, pixel_values, tmp_path, names, attention):
    bare.save_pretrained(tmp_path, save_original_format=names == "transformers 4")
    model = AutoLambdaModel.from_pretrained(tmp_path, attn_implementation=attention)
    bare.set_attn_implementation(attention)
    assert type(model).__name__ == f"Lambda{type(bare).__name__}"
    assert equal(features(model, pixel_values), features(bare, pixel_values))
    asked = {"output_hidden_states": True, "output_attentions": attention == "eager"}
    with torch.no_grad():
        ours, theirs = model(pixel_values, **asked), bare(pixel_values, **asked)
    assert equal(ours.hidden_states, theirs.hidden_states)
    if attention == "eager":
        assert equal(ours.attentions, theirs.attentions) and len(ours.attentions) == 6


@pytest.mark.parametrize(
    ("dtype", "fade_to"),
    [(torch.float32, "identity"), (torch.bfloat16, "identity"), (torch.float64, "identity"), (torch.bfloat16, "skip")],
)
def test_off_removed_and_folded_are_one_function_to_the_bit(bare, pixel_values, tmp_path, dtype, fade_to):
    bare.config.layer_norm_eps = 1e-2  # large enough to be seen
    bare.save_pretrained(tmp_path)
    model = AutoLambdaModel.from_pretrained(tmp_path, dtype=dtype, fade_to=fade_to)
    pixel_values = pixel_values.to(dtype)
    model.set_attention_lambda(0.0, REMOVED)
    off = features(model, pixel_values)
    model.remove_attention(REMOVED)
    assert equal(features(model, pixel_values), off)
    states = model(pixel_values, output_hidden_states=True).hidden_states
    model.fold_removed_attention()
    assert equal(features(model, pixel_values), off)
    assert equal(model(pixel_values, output_hidden_states=True).hidden_states, states)
    assert not [name for name, _ in model.named_parameters() for i in REMOVED if f".{i}.self_attn" in name]
    model.save_pretrained(tmp_path / "removed")
    again = AutoModel.from_pretrained(tmp_path / "removed", dtype=dtype)
    assert type(again) is type(model) and again.config.fold_removed is (fade_to == "identity")
    assert equal(features(again, pixel_values), off)


@pytest.mark.parametrize("fade_to", ["identity", "skip"])
def test_attention_fades_as_in_the_paper_or_to_nothing(bare, pixel_values, tmp_path, fade_to):
    bare.save_pretrained(tmp_path)
    model = AutoLambdaModel.from_pretrained(tmp_path)
    model.set_fade_to(fade_to)
    layer = model.encoder_layers[1]
    hidden_states, extra = model.embed(pixel_values)
    with torch.no_grad():
        branch = layer.attention_branch(hidden_states, **extra)
        assert branch.abs().max() > 1e-3
        for value in (1.0, 0.25, 0.0):
            layer.set_attention_lambda(value)
            expected = ((2 - value) if fade_to == "identity" else 1) * hidden_states + value * branch
            torch.testing.assert_close(layer.mix_tokens(hidden_states, **extra), expected)


def test_forty_layers_with_twenty_removed_stay_finite_in_float16(bare, pixel_values):
    config = family_class(bare.config.model_type, "Config").from_dict(
        {**bare.config.to_dict(), "num_hidden_layers": 40, "out_features": None, "out_indices": None}
    )
    torch.manual_seed(0)
    model = family_class(bare.config.model_type, "Model")(config).eval()
    model.remove_attention(list(range(1, 40, 2)))
    model.fold_removed_attention()
    streams = []
    for layer in model.encoder_layers:
        layer.register_forward_hook(lambda *call: streams.append(call[-1]))
    pooled = features(model.half(), pixel_values.half())[-1]
    assert all(torch.isfinite(stream).all() for stream in streams)
    if config.model_type != "lambda_clip_vision" and "siglip" not in config.model_type:
        assert torch.isfinite(pooled).all()


def test_a_classifier_is_transformers_to_the_bit_and_one_function(classifier, pixel_values, tmp_path):
    classifier.save_pretrained(tmp_path)
    model = AutoLambdaModelForImageClassification.from_pretrained(tmp_path)
    assert not model.newly_initialized_head
    with torch.no_grad():
        assert torch.equal(model(pixel_values).logits, classifier(pixel_values).logits)
        model.set_attention_lambda(0.0, REMOVED)
        off = model(pixel_values).logits
        model.remove_attention(REMOVED)
        model.fold_removed_attention()
        assert torch.equal(model(pixel_values).logits, off)
    model.save_pretrained(tmp_path / "removed")
    again = AutoModelForImageClassification.from_pretrained(tmp_path / "removed")
    with torch.no_grad():
        assert torch.equal(again(pixel_values).logits, off)
        hidden_states, extra = model.embed(pixel_values)
        for layer in model.encoder_layers:
            hidden_states = layer(hidden_states, **extra)
        torch.testing.assert_close(model.read_out(hidden_states, "class_head"), off)
        prepared = copy.deepcopy(model).prepare_for_inference()
        torch.testing.assert_close(prepared(pixel_values).logits, off, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("name", "reads"), [("Siglip", slice(None)), ("CLIP", slice(1, None))])
def test_a_tower_of_images_and_texts_gives_the_towers_features_and_a_classifier(
    name, reads, dtype, pixel_values, tmp_path
):
    torch.manual_seed(0)
    pair = trained_looking(whole(name))
    pair.save_pretrained(tmp_path)
    model = AutoLambdaModel.from_pretrained(tmp_path)
    assert equal(features(model, pixel_values), features(pair.vision_model, pixel_values))
    classifier = AutoLambdaModelForImageClassification.from_pretrained(tmp_path, num_labels=5, dtype=dtype)
    assert classifier.newly_initialized_head
    pixel_values = pixel_values.to(dtype)
    with torch.no_grad():
        tokens = pair.to(dtype).vision_model(pixel_values).last_hidden_state[:, reads]
        expected = classifier.classifier(tokens.mean(dim=1))
        assert torch.equal(classifier(pixel_values).logits, expected)
        classifier.remove_attention(REMOVED)
        removed = classifier(pixel_values).logits
        classifier.fold_removed_attention()
        assert torch.equal(classifier(pixel_values).logits, removed)


@pytest.mark.parametrize("name", ["Siglip", "CLIP"])
def test_a_classifier_of_transformers_loads_with_its_head(name, pixel_values, tmp_path):
    torch.manual_seed(0)
    config = whole(name).config
    config.num_labels = 5
    theirs = trained_looking(getattr(transformers, f"{name}ForImageClassification")(config))
    theirs.save_pretrained(tmp_path)
    model = AutoLambdaModelForImageClassification.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(model(pixel_values).logits, theirs(pixel_values).logits)


def test_dinov3_has_a_classifier_of_class_token_and_patch_mean(pixel_values, tmp_path):
    torch.manual_seed(0)
    theirs = trained_looking(BARE["dinov3_vit"]())
    theirs.save_pretrained(tmp_path)
    model = AutoLambdaModelForImageClassification.from_pretrained(tmp_path, num_labels=5)
    with torch.no_grad():
        tokens = theirs(pixel_values).last_hidden_state
        expected = model.classifier(torch.cat([tokens[:, 0], tokens[:, 4:].mean(dim=1)], dim=1))
        assert torch.equal(model(pixel_values).logits, expected)


@pytest.mark.parametrize("name", ["Dinov2", "Dinov2WithRegisters", "DINOv3ViT"])
def test_a_folded_backbone_gives_the_maps_of_the_whole_one_without_these_layers(name, pixel_values, tmp_path):
    torch.manual_seed(0)
    shape = {"Dinov2": SHAPE, "Dinov2WithRegisters": REGISTERS, "DINOv3ViT": V3}[name]
    theirs = trained_looking(of(name, "Backbone", **shape, out_indices=[1, 3, 6]))
    theirs.save_pretrained(tmp_path)
    backbone = getattr(lambda_vit_hf, f"Lambda{name}Backbone").from_pretrained(tmp_path)
    with torch.no_grad():
        assert equal(backbone(pixel_values).feature_maps, theirs(pixel_values).feature_maps)
        backbone.remove_attention(REMOVED)
        maps = backbone(pixel_values).feature_maps
        backbone.fold_removed_attention()
        assert equal(backbone(pixel_values).feature_maps, maps)


@pytest.mark.parametrize("family", ["dinov2", "dinov2_with_registers", "siglip_vision_model", "clip_vision_model"])
def test_stored_positions_of_another_size_are_those_the_family_interpolates(family, tmp_path):
    torch.manual_seed(0)
    theirs = trained_looking(BARE[family]())
    theirs.save_pretrained(tmp_path)
    larger = torch.randn(2, 3, 24, 24)
    asked = {"interpolate_pos_encoding": True} if "vision" in family else {}
    model = AutoLambdaModel.from_pretrained(tmp_path, image_size=24)
    assert equal(features(model, larger), features(theirs, larger, **asked))
    model.save_pretrained(tmp_path / "larger")
    assert equal(features(AutoLambdaModel.from_pretrained(tmp_path / "larger"), larger), features(model, larger))
    with pytest.raises(ValueError, match="square"):
        model.set_image_size((16, 24))


def test_an_unsupported_family_names_the_supported_ones(tmp_path):
    transformers.BertConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="`dinov2`"):
        AutoLambdaModelForImageClassification.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("name", "said"), [("/no/such/model", "no folder"), ("outputs/no-model", "no folder"), ("", "no config.json")]
)
def test_a_name_that_leads_to_no_model_is_named(tmp_path, name, said):
    name = name or str(tmp_path)
    for load in (AutoLambdaModelForImageClassification.from_pretrained, load_classifier):
        with pytest.raises(OSError, match=said) as caught:
            load(name)
        assert name in str(caught.value)


def test_a_class_of_one_family_refuses_checkpoints_of_another(tmp_path):
    BARE["clip_vision_model"]().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="clip_vision_model"):
        lambda_vit_hf.LambdaDinov2Model.from_pretrained(tmp_path)


def test_no_family_is_forgotten_by_the_tests():
    from tests.end_to_end.test_families import CHECKPOINTS

    families = {ending for ending, _ in FAMILIES.values()}
    bare = {FAMILIES[name.partition(",")[0]][0] for name in BARE}
    assert bare == families
    assert {FAMILIES[name][0] for name in CHECKPOINTS} == families
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    assert [name for name in FAMILIES if f"`{name}`" not in readme] == []
