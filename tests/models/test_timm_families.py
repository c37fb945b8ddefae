"""timm's files of every family: the same features as timm's model, and every tensor of the file used."""

import pytest
import timm
import torch
from safetensors.torch import save_file
from transformers import AutoImageProcessor

from lambda_vit_hf.cli import convert as program
from lambda_vit_hf.models.conversion import convert_checkpoint
from lambda_vit_hf.models.families import AutoLambdaModel
from lambda_vit_hf.models.timm_layouts import LAYOUTS
from tests.conftest import perturb


SHAPE = dict(img_size=32, patch_size=8, embed_dim=64, depth=3, num_heads=4)
HEADS = 4
# Family, timm's model, and what its file does not say.
CASES = {
    "deit": ("deit", "deit_tiny_distilled_patch16_224", dict(num_classes=7), {}),
    "dinov2": ("dinov2", "vit_small_patch14_dinov2", {}, {}),
    "dinov2, gated": ("dinov2", "vit_giant_patch14_dinov2", dict(mlp_ratio=5.5), {}),
    "dinov2_with_registers": ("dinov2_with_registers", "vit_small_patch14_reg4_dinov2", {}, {}),
    "dinov3": ("dinov3_vit", "vit_small_patch16_dinov3", {}, dict(stored_image_size=32)),
    "dinov3, biases": ("dinov3_vit", "vit_small_patch16_dinov3_qkvb", {}, dict(stored_image_size=32)),
    "dinov3, gated": ("dinov3_vit", "vit_small_plus_patch16_dinov3", {}, dict(stored_image_size=32)),
    "siglip": ("siglip_vision", "vit_base_patch16_siglip_224", {}, dict(hidden_act="gelu")),
    "siglip 2": ("siglip_vision", "vit_so400m_patch16_siglip_256", {}, dict(hidden_act="gelu_pytorch_tanh")),
    "clip": ("clip_vision", "vit_base_patch32_clip_224", dict(num_classes=0), dict(hidden_act="gelu")),
    "clip, OpenAI's": (
        "clip_vision", "vit_base_patch32_clip_quickgelu_224", dict(num_classes=0), dict(hidden_act="quick_gelu"),
    ),
}  # fmt: skip


def make(name):
    """A small model of timm with its weights moved from where they start, and how to read its file."""
    family, timm_name, arguments, unsaid = CASES[name]
    torch.manual_seed(0)
    model = perturb(timm.create_model(timm_name, pretrained=False, **SHAPE, **arguments), size=0.05)
    return model, dict(family=family, num_attention_heads=HEADS, **unsaid)


@pytest.fixture(params=CASES)
def case(request, tmp_path):
    model, options = make(request.param)
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, tmp_path / "timm.safetensors")
    return model, tmp_path / "timm.safetensors", options


@pytest.fixture
def images():
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def outputs(model, images) -> list[torch.Tensor]:
    """Of a model of transformers: logits of both heads; or the tokens behind the last LayerNorm, and what it pools."""
    found = model(images)
    if hasattr(found, "logits"):
        return [found.cls_logits, found.distillation_logits]
    image, _ = model.image_and_patch_features(found.last_hidden_state)
    tokens = found.last_hidden_state
    return [tokens if model._head_reads_norm else model.post_layernorm(tokens), image]


@torch.no_grad()
def outputs_of_timm(model, images) -> list[torch.Tensor]:
    tokens = model.forward_features(images)
    if hasattr(model, "head_dist"):
        return [model.head(tokens[:, 0]), model.head_dist(tokens[:, 1])]
    return [tokens, model.attn_pool(tokens) if model.attn_pool is not None else tokens[:, 0]]


def assert_near(found, expected):
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=2e-5)


def test_features_equal_those_of_timm(case, images, tmp_path):
    source, path, options = case
    model = convert_checkpoint(path, **options)
    expected = outputs_of_timm(source, images)
    assert_near(outputs(model, images), expected)
    model.save_pretrained(tmp_path / "saved")
    again = type(model).from_pretrained(tmp_path / "saved")
    assert type(again).__name__.startswith("Lambda") and again.config.image_size == 32
    assert all(torch.equal(a, b) for a, b in zip(outputs(again, images), outputs(model, images), strict=True))
    removed = convert_checkpoint(path, [0, 2], **options)
    assert removed.config.removed_layers == [0, 2] and removed.config.fold_removed


def test_a_missing_or_left_over_tensor_is_named(case, tmp_path):
    source, _, options = case
    weights = source.state_dict()
    names = ["norm.bias", "blocks.1.mlp.fc2.weight", "blocks.2.attn.qkv.weight"]
    names += [
        name for name in ("reg_token", "pos_embed", "attn_pool.kv.bias", "blocks.0.ls1.gamma") if name in weights
    ]
    for name in names:
        save_file({key: value for key, value in weights.items() if key != name}, tmp_path / "less.safetensors")
        with pytest.raises(ValueError, match=r"missing|must have shape"):
            convert_checkpoint(tmp_path / "less.safetensors", **options)
    save_file({**weights, "blocks.1.attn.q_norm.weight": torch.ones(16)}, tmp_path / "more.safetensors")
    with pytest.raises(ValueError, match=r"unknown: blocks\.1\.attn\.q_norm\.weight"):
        convert_checkpoint(tmp_path / "more.safetensors", **options)


def test_a_file_of_one_family_is_refused_by_the_others(case):
    _, path, options = case
    for family in set(LAYOUTS) - {options["family"]}:
        with pytest.raises(ValueError):
            convert_checkpoint(path, **{"hidden_act": "gelu", **options, "family": family})


def test_another_image_size_is_the_familys_own_interpolation(tmp_path):
    source, options = make("dinov2")
    save_file(source.state_dict(), tmp_path / "timm.safetensors")
    model = convert_checkpoint(tmp_path / "timm.safetensors", image_size=48, **options)
    expected = convert_checkpoint(tmp_path / "timm.safetensors", **options)
    larger = torch.randn(2, 3, 48, 48)
    assert model.config.image_size == 48
    assert all(torch.equal(a, b) for a, b in zip(outputs(model, larger), outputs(expected, larger), strict=True))


def test_what_the_file_does_not_say_is_asked_for(tmp_path):
    for name in ("siglip", "clip"):
        source, options = make(name)
        save_file(source.state_dict(), tmp_path / "timm.safetensors")
        with pytest.raises(ValueError, match="hidden_act"):
            convert_checkpoint(tmp_path / "timm.safetensors", **{**options, "hidden_act": None})
    with pytest.raises(ValueError, match="clip_vision"):
        convert_checkpoint(tmp_path / "timm.safetensors", family="beit")


def test_a_head_that_reads_other_features_is_dropped_only_on_demand(tmp_path):
    torch.manual_seed(0)
    source = timm.create_model("vit_small_patch14_dinov2", pretrained=False, num_classes=5, **SHAPE)
    save_file(source.state_dict(), tmp_path / "timm.safetensors")
    options = dict(family="dinov2", num_attention_heads=HEADS)
    with pytest.raises(ValueError, match=r"unknown: head\.bias, head\.weight.*drop_head=True"):
        convert_checkpoint(tmp_path / "timm.safetensors", **options)
    images = torch.randn(2, 3, 32, 32)
    model = convert_checkpoint(tmp_path / "timm.safetensors", drop_head=True, **options)
    assert_near(outputs(model, images), outputs_of_timm(source, images))


def test_the_program_writes_an_encoder_with_its_familys_preprocessing(tmp_path, capsys):
    save_file(make("clip")[0].state_dict(), tmp_path / "timm.safetensors")
    program.main([str(tmp_path / "timm.safetensors"), "--output_dir", str(tmp_path / "out"), "--family", "clip_vision",
                  "--hidden_act", "gelu", "--num_attention_heads", "4", "--removed_layers", "1"])  # fmt: skip
    assert "2 kept, 1 removed" in capsys.readouterr().out
    model = AutoLambdaModel.from_pretrained(tmp_path / "out")
    assert type(model).__name__ == "LambdaCLIPVisionModel" and model.config.removed_layers == [1]
    mean = AutoImageProcessor.from_pretrained(tmp_path / "out").image_mean
    assert list(mean) == [0.48145466, 0.4578275, 0.40821073]
