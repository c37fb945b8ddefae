import argparse
import os
import pickle
import zipfile
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.layers import resample_abs_pos_embed
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    DeiTConfig,
    DeiTForImageClassificationWithTeacher,
)

from lambda_vit_hf import LambdaViTForImageClassification
from lambda_vit_hf.cli import convert as program
from lambda_vit_hf.models.conversion import convert_checkpoint, resize_position_embeddings
from tests.conftest import perturb


SHAPE = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 5, "num_heads": 4, "num_classes": 7}
HEADS = 4  # not the one head of 64 dimensions that the width suggests: a wrong number of heads changes the logits


def timm_vit(**arguments) -> torch.nn.Module:
    """A small ViT of timm, every parameter moved away from its initial value."""
    torch.manual_seed(0)
    return perturb(timm.create_model("vit_tiny_patch16_224", pretrained=False, **{**SHAPE, **arguments}), size=0.05)


def random_images(size: int = 32, count: int = 3) -> torch.Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits(model, pixel_values):
    output = model(pixel_values)
    return output if isinstance(output, torch.Tensor) else output.logits


@torch.no_grad()
def pruned_logits(model, pixel_values, removed):
    """The authors' arithmetic at lambda = 0, on timm's own modules."""
    x = model.patch_embed(pixel_values)
    x = torch.cat([model.cls_token.expand(len(x), -1, -1), x], dim=1) + model.pos_embed
    for index, block in enumerate(model.blocks):
        x = 2 * x if index in removed else x + block.attn(block.norm1(x))
        x = x + block.mlp(block.norm2(x))
    return model.head(model.norm(x)[:, 0])


@pytest.fixture(scope="module")
def source() -> torch.nn.Module:
    return timm_vit()


@pytest.fixture
def weights(source) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in source.state_dict().items()}


@pytest.fixture
def save(tmp_path):
    """Saves a checkpoint under a name; returns its path."""

    def save_as(content, name: str = "vit.pth") -> Path:
        path = tmp_path / name
        save_file(content, path) if name.endswith(".safetensors") else torch.save(content, path)
        return path

    return save_as


def test_logits_equal_those_of_timm(source, weights, save):
    model = convert_checkpoint(save(weights), num_attention_heads=HEADS)
    assert not model.training
    assert model.attention_lambdas == [1.0] * 5
    assert model.config.removed_layers == []
    assert not model.config.fold_removed
    torch.testing.assert_close(logits(model, random_images()), logits(source, random_images()), rtol=0, atol=1e-5)


def test_logits_of_a_base_model_equal_those_of_timm_with_twelve_heads_from_its_width(save):
    base = timm.create_model("vit_base_patch16_224", pretrained=False, num_classes=10, weight_init="skip")
    with torch.no_grad():  # much quicker than timm's own initialization
        for name, parameter in base.named_parameters():
            parameter.fill_("norm" in name and name.endswith("weight"))
    perturb(base, size=0.03)
    model = convert_checkpoint(save(base.state_dict(), "base.safetensors"))
    config = model.config
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (768, 12, 12)
    assert (config.intermediate_size, config.image_size, config.patch_size, config.num_labels) == (3072, 224, 16, 10)
    images = random_images(224, count=1)
    torch.testing.assert_close(logits(model, images), logits(base, images), rtol=0, atol=1e-5)


def test_the_configuration_is_read_off_the_shapes(save):
    source = timm_vit(in_chans=1, mlp_ratio=3, qkv_bias=False, img_size=24)
    config = convert_checkpoint(save(source.state_dict()), num_attention_heads=HEADS).config
    assert (config.image_size, config.patch_size, config.num_channels, config.intermediate_size) == (24, 8, 1, 192)
    assert (config.num_labels, config.num_hidden_layers, config.layer_norm_eps) == (7, 5, 1e-6)
    assert config.qkv_bias is False


def test_without_qkv_bias_logits_equal_those_of_timm(save):
    source = timm_vit(qkv_bias=False)
    model = convert_checkpoint(save(source.state_dict()), num_attention_heads=HEADS)
    torch.testing.assert_close(logits(model, random_images()), logits(source, random_images()), rtol=0, atol=1e-5)


@pytest.mark.parametrize("wrapping", [None, "model", "net", "state_dict", "model_ema"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_every_wrapping_gives_the_same_weights(weights, save, wrapping, prefix):
    expected = convert_checkpoint(save(weights, "flat.safetensors"), num_attention_heads=HEADS).state_dict()
    content = {prefix + name: tensor for name, tensor in weights.items()}
    if wrapping is not None:
        content = {wrapping: content, "epoch": 3, "args": argparse.Namespace(lr=5e-4, model="deit", aa=None)}
    found = convert_checkpoint(save(content), num_attention_heads=HEADS).state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def test_of_several_sets_of_weights_one_must_be_chosen(weights, save):
    averaged = {name: tensor / 2 for name, tensor in weights.items()}
    path = save({"model": weights, "model_ema": averaged})
    with pytest.raises(ValueError, match="weights_key"):
        convert_checkpoint(path, num_attention_heads=HEADS)
    with pytest.raises(ValueError, match="net"):
        convert_checkpoint(path, num_attention_heads=HEADS, weights_key="net")
    model = convert_checkpoint(path, num_attention_heads=HEADS, weights_key="model_ema")
    assert torch.equal(model.classifier.weight, averaged["head.weight"])


@pytest.mark.parametrize("fold", [True, False])
@pytest.mark.parametrize(
    ("name", "layers", "removed"),
    [
        ("tiny_024.pth", None, [0, 2, 4]),  # the authors' way to say it
        ("small_0246.pth", [1], [1]),
        ("small_1.pth", None, []),  # none of the files that the authors published
        ("base_384.pth", None, []),  # an image size
        ("base_16.pth", None, []),  # a patch size
        ("vit.pth", [3, 0], [0, 3]),
        ("tiny_024.pth", [1], [1]),  # what is asked for wins
        ("tiny_024.pth", [], []),
        ("my_tiny_024.pth", None, []),
        ("large_024.pth", None, []),
        ("tiny_024.pt", None, []),
    ],
)
def test_removed_layers_compute_what_the_authors_model_computes(source, weights, save, name, layers, removed, fold):
    path = save({"model": weights, "args": argparse.Namespace(output_dir="x")}, name)
    model = convert_checkpoint(path, layers, fold=fold, num_attention_heads=HEADS)
    assert model.config.removed_layers == removed
    assert model.config.fold_removed == (fold and bool(removed))
    assert not [key for key in model.state_dict() for index in removed if f"layers.{index}.attention" in key]
    expected = pruned_logits(source, random_images(), removed)
    torch.testing.assert_close(logits(model, random_images()), expected, rtol=0, atol=1e-5)


def test_the_authors_arithmetic_written_here_is_timms_where_nothing_is_removed(source):
    images = random_images()
    torch.testing.assert_close(pruned_logits(source, images, []), logits(source, images), rtol=0, atol=1e-6)
    assert (pruned_logits(source, images, [0, 2, 4]) - logits(source, images)).abs().max() > 0.01


def test_layers_taken_from_the_file_name_are_announced(weights, save, caplog):
    convert_checkpoint(save(weights, "tiny_024.pth"), num_attention_heads=HEADS)
    assert "[0, 2, 4]" in caplog.text


@pytest.mark.parametrize("layers", [[5], [0, 0], [-1], ["0"], [0, 1, 2, 3, 4]])
def test_layers_that_cannot_be_removed_are_refused(weights, save, layers):
    with pytest.raises(ValueError):
        convert_checkpoint(save(weights), layers, num_attention_heads=HEADS)


def test_a_file_name_with_more_layers_than_the_model_has_is_refused(weights, save):
    with pytest.raises(ValueError, match="out of range"):
        convert_checkpoint(save(weights, "base_013469.pth"), num_attention_heads=HEADS)


class WritesAFile:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"echo executed > {self.path}",)


@pytest.mark.parametrize("write", [torch.save, lambda content, path: path.write_bytes(pickle.dumps(content))])
def test_code_in_a_pickle_is_refused_and_not_run(weights, tmp_path, write):
    path, trace = tmp_path / "tiny_024.pth", tmp_path / "trace"
    write({"model": weights, "args": WritesAFile(trace)}, path)
    with pytest.raises(ValueError, match=r"refused.*safetensors"):
        convert_checkpoint(path, num_attention_heads=HEADS)
    assert not trace.exists()
    os.system(f"echo executed > {trace}")  # the payload would have left this trace
    assert trace.exists()


def test_code_inside_a_namespace_is_refused_and_not_run(weights, tmp_path, save):
    trace = tmp_path / "trace"
    path = save({"model": weights, "args": argparse.Namespace(lr=WritesAFile(trace))})
    with pytest.raises(ValueError, match="system"):
        convert_checkpoint(path, num_attention_heads=HEADS)
    assert not trace.exists()


def test_reading_a_namespace_leaves_the_allow_list_of_torch_as_it_was(weights, save):
    before = set(torch.serialization.get_safe_globals())
    convert_checkpoint(save({"model": weights, "args": argparse.Namespace()}), num_attention_heads=HEADS)
    assert set(torch.serialization.get_safe_globals()) == before


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
@pytest.mark.parametrize("name", ["vit.pth", "vit.safetensors"])
def test_a_truncated_file_is_an_error_that_names_it(weights, save, name, share):
    path = save(weights, name)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    with pytest.raises((OSError, ValueError), match=name):
        convert_checkpoint(path, num_attention_heads=HEADS)


@pytest.mark.parametrize("name", ["vit.pth", "vit.safetensors"])
def test_a_file_that_is_no_checkpoint_is_an_error_that_names_it(tmp_path, name):
    (tmp_path / name).write_bytes(b"<!DOCTYPE html>" * 100)
    with pytest.raises((OSError, ValueError), match=name):
        convert_checkpoint(tmp_path / name)


def test_a_missing_file_and_a_folder_are_not_found(tmp_path):
    for path in (tmp_path / "missing.pth", tmp_path):
        with pytest.raises(FileNotFoundError, match="from_pretrained"):
            convert_checkpoint(path)


def test_an_unknown_file_type_is_refused(tmp_path):
    (tmp_path / "vit.npz").write_bytes(b"PK")
    with pytest.raises(ValueError, match="safetensors"):
        convert_checkpoint(tmp_path / "vit.npz")


@pytest.mark.parametrize("content", [{}, [1, 2], 3.0, {"model": {}}, {0: torch.ones(2)}])
def test_a_file_without_named_weights_is_refused(save, content):
    with pytest.raises(ValueError, match="no named weights"):
        convert_checkpoint(save(content))


@pytest.mark.parametrize(
    "name",
    ["cls_token", "pos_embed", "norm.bias", "head.bias", "patch_embed.proj.bias", "blocks.2.attn.qkv.bias",
     "blocks.0.attn.qkv.weight", "blocks.4.mlp.fc2.weight"],
)  # fmt: skip
def test_a_missing_tensor_is_named(weights, save, name):
    del weights[name]
    with pytest.raises(ValueError, match=f"1 missing: {name}"):
        convert_checkpoint(save(weights), num_attention_heads=HEADS)


@pytest.mark.parametrize("index", [0, 2])
def test_a_missing_block_is_named(weights, save, index):
    weights = {name: tensor for name, tensor in weights.items() if not name.startswith(f"blocks.{index}.")}
    with pytest.raises(ValueError, match=f"missing: blocks.{index}.norm1.weight.*unknown: blocks.4.norm1.weight"):
        convert_checkpoint(save(weights), num_attention_heads=HEADS)


@pytest.mark.parametrize(
    "name",
    ["reg_token", "fc_norm.weight", "blocks.1.ls1.gamma", "norm_pre.weight", "blocks.0.attn.q_norm.weight", "epoch",
     "pre_logits.fc.weight", "blocks.99999999999.norm1.weight", "vit.encoder.layer.0.output.dense.bias"],
)  # fmt: skip
def test_an_unknown_tensor_is_named(weights, save, name):
    weights[name] = torch.ones(3)
    with pytest.raises(ValueError, match=f"unknown: {name}"):
        convert_checkpoint(save(weights), num_attention_heads=HEADS)


@pytest.mark.parametrize("name", ["dist_token", "head_dist.weight"])
def test_a_distilled_model_is_refused(weights, save, name):
    weights[name] = torch.ones(1, 1, 64)
    with pytest.raises(ValueError, match="distilled"):
        convert_checkpoint(save(weights), num_attention_heads=HEADS)


def test_timms_distilled_model_is_refused(save):
    distilled = timm.create_model("deit_tiny_distilled_patch16_224", pretrained=False, depth=1, num_classes=3)
    with pytest.raises(ValueError, match="distilled"):
        convert_checkpoint(save(distilled.state_dict()))


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("cls_token", lambda tensor: tensor[0]),
        ("pos_embed", lambda tensor: tensor[0]),
        ("pos_embed", lambda tensor: tensor[:, 1:]),  # as of models without a position for the class token
        ("pos_embed", lambda tensor: tensor[..., :8]),
        ("patch_embed.proj.weight", lambda tensor: tensor.flatten(1)),
        ("blocks.1.mlp.fc1.weight", lambda tensor: tensor[:16]),
        ("blocks.0.mlp.fc1.weight", lambda tensor: tensor[0]),
        ("blocks.1.attn.qkv.weight", lambda tensor: tensor[:-1]),
        ("blocks.3.norm2.weight", lambda tensor: tensor[:1]),
        ("head.bias", lambda tensor: tensor[0]),
        ("head.weight", lambda tensor: tensor[:3]),
        ("norm.weight", lambda tensor: tensor / 0),
        ("norm.weight", lambda tensor: tensor.long()),
        ("norm.weight", lambda tensor: tensor[:0]),
        ("norm.weight", lambda tensor: (tensor / 0).to(torch.float8_e5m2)),
        ("head.weight", lambda tensor: tensor.to_sparse()),
        ("head.weight", lambda tensor: torch.nested.nested_tensor([tensor[0], tensor[1]])),
        ("head.weight", lambda tensor: tensor.tolist()),
    ],
)
@pytest.mark.parametrize("image_size", [None, 64])
def test_a_tensor_that_cannot_be_used_is_a_value_error(weights, save, name, change, image_size):
    weights[name] = change(weights[name])
    with pytest.raises(ValueError):
        convert_checkpoint(save(weights), num_attention_heads=HEADS, image_size=image_size)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_become_float32(weights, save, dtype):
    weights = {name: tensor.to(dtype) for name, tensor in weights.items()}
    model = convert_checkpoint(save(weights), [0, 2], num_attention_heads=HEADS, image_size=40)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    expected = weights["blocks.1.mlp.fc1.weight"].float()
    assert torch.equal(model.vit.layers[1].mlp.fc1.weight, expected)


def test_every_weight_has_memory_of_its_own(weights, save):
    weights["blocks.1.mlp.fc1.weight"] = weights["blocks.0.mlp.fc1.weight"]
    model = convert_checkpoint(save(weights), num_attention_heads=HEADS)
    pointers = [parameter.untyped_storage().data_ptr() for parameter in model.parameters()]
    assert len(set(pointers)) == len(pointers)
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(("width", "heads"), [(64, 1), (192, 3), (384, 6)])
def test_heads_have_64_dimensions_unless_told_otherwise(save, width, heads):
    source = timm_vit(embed_dim=width, depth=1, num_heads=heads)
    model = convert_checkpoint(save(source.state_dict()))
    assert model.config.num_attention_heads == heads
    torch.testing.assert_close(logits(model, random_images()), logits(source, random_images()), rtol=0, atol=1e-5)


@pytest.mark.parametrize("width", [48, 1280, 1408])
def test_the_number_of_heads_is_not_guessed_where_it_is_uncertain(save, width):
    # 1280 and 1408 are multiples of 64, but ViT-H and ViT-g have 16 heads.
    source = timm.create_model(
        "vit_tiny_patch16_224", pretrained=False, img_size=16, embed_dim=width, depth=1, num_heads=16, mlp_ratio=0.1
    )
    path = save(source.state_dict())
    with pytest.raises(ValueError, match="num_attention_heads"):
        convert_checkpoint(path)
    assert convert_checkpoint(path, num_attention_heads=16).config.num_attention_heads == 16


@pytest.mark.parametrize("heads", [0, -4, 5, True, "4", 4.0])
def test_a_number_of_heads_that_does_not_divide_the_width_is_refused(weights, save, heads):
    with pytest.raises(ValueError, match="num_attention_heads"):
        convert_checkpoint(save(weights), num_attention_heads=heads)


def test_class_names_are_kept(weights, save, tmp_path):
    names = dict(enumerate(["crane", "crane", "no", "é", "a b", "", "x"]))
    model = convert_checkpoint(save(weights), num_attention_heads=HEADS, id2label=names)
    model.save_pretrained(tmp_path / "saved")
    assert AutoConfig.from_pretrained(tmp_path / "saved").id2label == names


@pytest.mark.parametrize("names", [{0: "a"}, {str(index): "a" for index in range(7)}, dict.fromkeys(range(1, 8), "a")])
def test_class_names_that_do_not_fit_the_head_are_refused(weights, save, names):
    with pytest.raises(ValueError, match="id2label"):
        convert_checkpoint(save(weights), num_attention_heads=HEADS, id2label=names)


def test_a_head_is_dropped_only_on_demand(source, weights, save):
    model = convert_checkpoint(save(weights), num_attention_heads=HEADS, drop_head=True)
    with torch.no_grad():
        features = source.forward_features(random_images())[:, 0]
    assert model.config.num_labels == 0
    torch.testing.assert_close(logits(model, random_images()), features, rtol=0, atol=1e-5)
    headless = {name: tensor for name, tensor in weights.items() if not name.startswith("head.")}
    with pytest.raises(ValueError, match="drop_head"):
        convert_checkpoint(save(headless), num_attention_heads=HEADS)
    same = convert_checkpoint(save(headless), num_attention_heads=HEADS, drop_head=True)
    assert torch.equal(logits(same, random_images()), logits(model, random_images()))


@pytest.mark.parametrize("grid", [(6, 6), (3, 3), (2, 7), (4, 8)])
def test_position_embeddings_are_resized_as_timm_does(grid):
    positions = torch.randn(1, 1 + 16, 8, generator=torch.Generator().manual_seed(0))
    expected = resample_abs_pos_embed(positions, list(grid), old_size=[4, 4])
    found = resize_position_embeddings(positions, grid)
    assert found.shape == (1, 1 + grid[0] * grid[1], 8)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    half = resize_position_embeddings(positions.half(), grid)
    assert half.dtype == torch.float16


def test_resizing_to_the_same_grid_changes_nothing():
    positions = torch.randn(1, 1 + 16, 8)
    assert torch.equal(resize_position_embeddings(positions, (4, 4)), positions)


@pytest.mark.parametrize("image_size", [48, (24, 48)])
def test_another_image_size_gives_the_logits_of_timm_at_that_size(source, weights, save, image_size, tmp_path):
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    resized = timm_vit(img_size=(height, width))
    resized.load_state_dict(
        {**weights, "pos_embed": resample_abs_pos_embed(weights["pos_embed"], [height // 8, width // 8])}
    )
    convert_checkpoint(save(weights), num_attention_heads=HEADS, image_size=image_size).save_pretrained(tmp_path / "s")
    model = LambdaViTForImageClassification.from_pretrained(tmp_path / "s")
    images = torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(logits(model, images), logits(resized, images), rtol=0, atol=1e-5)


def test_the_image_size_of_the_file_gives_the_same_weights(weights, save):
    model = convert_checkpoint(save(weights), num_attention_heads=HEADS, image_size=32)
    assert torch.equal(model.vit.embeddings.position_embeddings, weights["pos_embed"])


@pytest.mark.parametrize("image_size", [33, 0, -8, "32", 32.0, True, (32,), (32, 33)])
def test_an_image_size_that_is_no_multiple_of_the_patch_size_is_refused(weights, save, image_size):
    with pytest.raises(ValueError, match="image_size"):
        convert_checkpoint(save(weights), num_attention_heads=HEADS, image_size=image_size)


def test_the_program_writes_a_folder_that_loads_by_itself(source, weights, save, tmp_path, capsys):
    path = save({"model": weights, "args": argparse.Namespace(output_dir="")}, "tiny_024.pth")
    folder = tmp_path / "out" / "converted"
    program.main([str(path), "--output_dir", str(folder), "--num_attention_heads", "4"])
    assert "2 kept, 3 removed" in capsys.readouterr().out
    model = AutoModelForImageClassification.from_pretrained(folder)
    assert isinstance(model, LambdaViTForImageClassification)
    expected = convert_checkpoint(path, num_attention_heads=HEADS)
    assert torch.equal(logits(model, random_images()), logits(expected, random_images()))
    expected = pruned_logits(source, random_images(), [0, 2, 4])
    torch.testing.assert_close(logits(model, random_images()), expected, rtol=0, atol=1e-5)
    processor = AutoImageProcessor.from_pretrained(folder)
    pixels = processor(torch.zeros(3, 50, 70, dtype=torch.uint8), return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, 32, 32)
    # Black, normalized with ImageNet's mean and standard deviation.
    torch.testing.assert_close(pixels[0, :, 0, 0], torch.tensor([-0.485 / 0.229, -0.456 / 0.224, -0.406 / 0.225]))
    assert processor.resample == 3


def test_the_programs_options_reach_the_conversion(weights, save, tmp_path):
    path = save({"model": weights, "model_ema": weights}, "tiny_024.pth")
    options = "--removed_layers 1 --no_fold --num_attention_heads 4 --image_size 64 --weights_key model --drop_head"
    processing = "--crop_pct 0.8 --image_mean 0.5 0.5 0.5 --image_std 0.5 0.5 0.5"
    program.main([str(path), "--output_dir", str(tmp_path / "out"), *options.split(), *processing.split()])
    config = AutoConfig.from_pretrained(tmp_path / "out")
    assert (config.removed_layers, config.fold_removed, config.image_size) == ([1], False, 64)
    assert (config.num_attention_heads, config.num_labels) == (4, 0)
    processor = AutoImageProcessor.from_pretrained(tmp_path / "out")
    assert processor.size["shortest_edge"] == 80
    assert processor.crop_size["height"] == 64
    assert list(processor.image_mean) == [0.5] * 3


def test_layers_without_a_value_keeps_all_attention_whatever_the_name(weights, save, tmp_path):
    path = save(weights, "tiny_024.pth")
    program.main([str(path), "--output_dir", str(tmp_path / "out"), "--num_attention_heads", "4", "--removed_layers"])
    assert AutoConfig.from_pretrained(tmp_path / "out").removed_layers == []


def test_the_program_leaves_a_folder_that_is_not_empty_alone(weights, save, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text("mine")
    with pytest.raises(FileExistsError, match="output_dir"):
        program.main([str(save(weights)), "--output_dir", str(tmp_path / "out"), "--num_attention_heads", "4"])
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["config.json"]
    assert (tmp_path / "out" / "config.json").read_text() == "mine"


def test_a_hugging_face_deit_is_refused(tmp_path):
    config = DeiTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    DeiTForImageClassificationWithTeacher(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="deit"):
        LambdaViTForImageClassification.from_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="from_pretrained"):
        convert_checkpoint(tmp_path)
    with pytest.raises(ValueError, match=r"unknown: .*deit.*from_pretrained"):
        convert_checkpoint(tmp_path / "model.safetensors")


def test_a_zip_bomb_is_refused_before_it_is_unpacked(weights, save):
    path = save({"model": {**weights, "head.weight": torch.zeros(7, 64)}})
    bomb = path.with_name("bomb.pth")
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as packed:
        for record in archive.infolist():
            content = archive.read(record)
            packed.writestr(record.filename, bytes(10**8) if record.filename.endswith("data/0") else content)
    assert bomb.stat().st_size < 2 * 10**6
    with pytest.raises(ValueError, match=r"bomb\.pth is refused, and nothing in it was read.*grow to"):
        convert_checkpoint(bomb)


def test_a_tensor_that_repeats_a_few_bytes_is_refused(weights, save):
    # 16 TB, from the one number that is in the file.
    weights["pos_embed"] = torch.zeros(1).expand(1, 10**6, 10**6 * 4)
    with pytest.raises(ValueError, match=r"would take 16,000,0.* bytes, over 10 times"):
        convert_checkpoint(save(weights))


@pytest.mark.parametrize("record", ["data/3", "data.pkl"])
def test_a_flipped_bit_in_an_archive_is_refused(weights, save, record):
    path = save(weights)
    with zipfile.ZipFile(path) as archive:
        info = next(one for one in archive.infolist() if one.filename.endswith(record))
        start = path.read_bytes().index(archive.read(info)[:64], info.header_offset + 30)
    content = bytearray(path.read_bytes())
    content[start + 40] ^= 16
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"refused.*the checksum of .*{record} in it does not fit"):
        convert_checkpoint(path)
