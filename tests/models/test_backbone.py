"""A LambdaViT as a backbone: its stages and their feature maps."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
)

from lambda_vit_hf import (
    LambdaViTBackbone,
    LambdaViTConfig,
)
from tests.conftest import REMOVED


def feature_maps(model, pixel_values):
    with torch.no_grad():
        return model(pixel_values).feature_maps


def test_a_backbone_from_a_vit_checkpoint_gives_the_normed_hidden_states(vit, vit_folder, pixel_values):
    backbone = LambdaViTBackbone.from_pretrained(vit_folder, out_indices=[0, 2, -1])
    assert (backbone.out_features, backbone.channels) == (["stem", "stage2", "stage6"], [32, 32, 32])
    with torch.no_grad():
        hidden_states = vit(pixel_values, output_hidden_states=True).hidden_states
        expected = [vit.vit.layernorm(hidden_states[index])[:, 1:].reshape(3, 4, 4, 32) for index in (0, 2, 6)]
    for ours, theirs in zip(feature_maps(backbone, pixel_values), expected, strict=True):
        assert torch.equal(ours, theirs.permute(0, 3, 1, 2))


@pytest.mark.parametrize("apply_layernorm", [True, False])
def test_a_folded_backbone_equals_the_unfolded_one_in_every_stage(vit_folder, pixel_values, apply_layernorm):
    # A large epsilon: the LayerNorm of a stage in a folded stream needs its own.
    options = {"layer_norm_eps": 0.1, "apply_layernorm": apply_layernorm, "out_indices": list(range(7))}
    unfolded = LambdaViTBackbone.from_pretrained(vit_folder, **options)
    unfolded.remove_attention(REMOVED)
    flags = unfolded.config.attention_flags
    folded = LambdaViTBackbone.from_pretrained(vit_folder, attention_flags=flags, fold_removed=True, **options)
    assert folded.config.fold_removed
    maps = zip(feature_maps(folded, pixel_values), feature_maps(unfolded, pixel_values), strict=True)
    assert [index for index, (ours, theirs) in enumerate(maps) if not torch.equal(ours, theirs)] == []


def test_backbone_shapes_follow_image_and_config(vit_folder):
    backbone = LambdaViTBackbone.from_pretrained(vit_folder, out_features=["stage3"])
    wide = torch.zeros(2, 3, 20, 28)
    (feature_map,) = backbone(wide, interpolate_pos_encoding=True).feature_maps
    assert feature_map.shape == (2, 32, 5, 7)
    output = backbone(torch.zeros(2, 3, 16, 16), output_hidden_states=True)
    assert len(output.hidden_states) == 7
    backbone.config.reshape_hidden_states = False
    assert backbone(torch.zeros(2, 3, 16, 16), return_dict=False)[0][0].shape == (2, 17, 32)


def test_a_backbone_with_a_missing_weight_is_refused(vit_folder):
    tensors = load_file(vit_folder / "model.safetensors")
    del tensors["vit.encoder.layer.3.output.dense.weight"]
    save_file(tensors, vit_folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"stay random.*layers\.3\.mlp\.fc2"):
        LambdaViTBackbone.from_pretrained(vit_folder)


def test_stages_are_saved_and_can_be_chosen_again_by_either_name(tmp_path):
    LambdaViTConfig(num_hidden_layers=4, out_features=["stem", "stage2"]).save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).out_indices == [0, 2]
    assert AutoConfig.from_pretrained(tmp_path, out_indices=[1]).out_features == ["stage1"]
    assert AutoConfig.from_pretrained(tmp_path, out_features=["stage4"]).out_indices == [4]


def test_the_default_stage_is_the_last_and_not_written(tmp_path):
    config = LambdaViTConfig(num_hidden_layers=4)
    assert (config.out_features, config.out_indices) == (["stage4"], [4])
    config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert not {"out_features", "out_indices", "stage_names"} & written.keys()


@pytest.mark.parametrize(
    ("stages", "said"),
    [
        ({"out_features": ["stage5"]}, "subset of stage_names"),
        ({"out_features": ["stage2", "stage1"]}, "same order"),
        ({"out_indices": [5]}, "from -5 to 4"),
        ({"out_indices": [-6]}, "from -5 to 4"),
        ({"out_indices": ["stage1"]}, "must hold integers"),
        ({"out_indices": [1, 1]}, "duplicates"),
        ({"out_indices": [1], "out_features": ["stage2"]}, "same stages"),
    ],
)
def test_stages_that_do_not_exist_are_refused(tmp_path, stages, said):
    with pytest.raises(ValueError, match=said):
        LambdaViTConfig(num_hidden_layers=4, **stages)
    LambdaViTConfig(num_hidden_layers=4).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=said):
        LambdaViTConfig.from_pretrained(tmp_path, **stages)
