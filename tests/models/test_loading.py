"""Loading: exact, or an error that says why."""

import copy
import json
import os
import pickle

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForImageClassification,
)

from lambda_vit_hf import LambdaViTForImageClassification, LambdaViTModel
from lambda_vit_hf.evaluation.classifier import load_classifier
from tests.conftest import REMOVED


def logits(model, pixel_values):
    with torch.no_grad():
        return model(pixel_values).logits


def write_flag(folder, layer: int, flag: bool) -> None:
    """Make a saved config say something else than its weights."""
    config = json.loads((folder / "config.json").read_text())
    config["attention_flags"][layer] = flag
    (folder / "config.json").write_text(json.dumps(config))


def test_loading_with_flags_equals_removing_after_loading(model, vit_folder, pixel_values, capsys):
    flags = [index not in REMOVED for index in range(6)]
    started = LambdaViTForImageClassification.from_pretrained(vit_folder, attention_flags=flags, fold_removed=True)
    model.remove_attention(REMOVED)
    assert torch.equal(logits(started, pixel_values), logits(model, pixel_values))
    assert started.config.fold_removed


def test_layers_to_start_without_can_be_named_by_index(model, vit_folder, pixel_values):
    started = LambdaViTForImageClassification.from_pretrained(vit_folder, removed_layers=REMOVED)
    model.remove_attention(REMOVED)
    assert torch.equal(logits(started, pixel_values), logits(model, pixel_values))
    with pytest.raises(ValueError, match="out of range"):
        LambdaViTForImageClassification.from_pretrained(vit_folder, removed_layers=[6])
    with pytest.raises(ValueError, match="not both"):
        LambdaViTForImageClassification.from_pretrained(vit_folder, removed_layers=[1], attention_flags=[True] * 6)


def test_an_unfolded_checkpoint_can_be_folded_and_pruned_further_on_loading(model, tmp_path, pixel_values):
    model.remove_attention([0])
    model.save_pretrained(tmp_path)
    flags = [index not in REMOVED for index in range(6)]
    further = AutoModelForImageClassification.from_pretrained(tmp_path, attention_flags=flags, fold_removed=True)
    model.remove_attention([2, 5])
    assert torch.equal(logits(further, pixel_values), logits(model, pixel_values))


def test_removed_attention_cannot_come_back(model, tmp_path):
    model.remove_attention([0])
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"attention in layers \[0\]"):
        LambdaViTForImageClassification.from_pretrained(tmp_path, attention_flags=[True] * 6)


def test_a_removed_config_over_full_weights_is_an_error(model, tmp_path):
    model.save_pretrained(tmp_path)
    write_flag(tmp_path, layer=1, flag=False)
    with pytest.raises(ValueError, match=r"(?s)not in the model.*layers\.1\.attention"):
        LambdaViTForImageClassification.from_pretrained(tmp_path)


def test_a_full_config_over_removed_weights_is_an_error(model, tmp_path):
    model.remove_attention([1])
    model.save_pretrained(tmp_path)
    write_flag(tmp_path, layer=1, flag=True)
    with pytest.raises(ValueError, match=r"(?s)stay random.*layers\.1\."):
        LambdaViTForImageClassification.from_pretrained(tmp_path)


def test_a_missing_encoder_weight_is_an_error(vit_folder):
    path = vit_folder / "model.safetensors"
    tensors = load_file(path)
    tensors.pop("vit.encoder.layer.3.output.dense.weight")
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"vit\.layers\.3\.mlp\.fc2\.weight"):
        LambdaViTForImageClassification.from_pretrained(vit_folder)


def test_an_encoder_weight_of_another_shape_is_an_error_even_if_mismatches_are_ignored(vit_folder):
    with pytest.raises(ValueError, match="of another shape"):
        LambdaViTForImageClassification.from_pretrained(vit_folder, intermediate_size=48, ignore_mismatched_sizes=True)


def test_saved_names_are_the_modules_names(model, tmp_path):
    # Trainer resumes with load_state_dict, without renaming (transformers#48805).
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as weights:
        assert set(weights.keys()) == set(model.state_dict())


def test_position_embeddings_are_interpolated_for_another_image_size(model, vit_folder, tmp_path):
    larger = LambdaViTForImageClassification.from_pretrained(vit_folder, image_size=32)
    expected = timm.layers.resample_abs_pos_embed(model.vit.embeddings.position_embeddings, [8, 8])
    torch.testing.assert_close(larger.vit.embeddings.position_embeddings, expected)
    pixel_values = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    larger.save_pretrained(tmp_path)
    restored = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert restored.config.image_size == 32
    assert torch.equal(logits(restored, pixel_values), logits(larger, pixel_values))
    with pytest.raises(ValueError, match="multiples of the patch size 4"):
        LambdaViTForImageClassification.from_pretrained(vit_folder, image_size=30)


def test_the_classifier_is_replaced_only_when_asked(vit_folder):
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        LambdaViTForImageClassification.from_pretrained(vit_folder, num_labels=9)
    replaced = LambdaViTForImageClassification.from_pretrained(vit_folder, num_labels=9, ignore_mismatched_sizes=True)
    assert replaced.classifier.weight.shape == (9, 32)


@pytest.mark.parametrize("damage", ["cut short", "longer", "garbage"])
def test_damaged_weights_are_named(vit_folder, damage):
    path = vit_folder / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes({"cut short": whole[: len(whole) // 2], "longer": whole + b"x", "garbage": b"x" * 100}[damage])
    with pytest.raises(OSError, match=r"are damaged.*Download or save them again"):
        LambdaViTForImageClassification.from_pretrained(vit_folder)


def test_a_folder_without_weights_is_named(vit_folder):
    (vit_folder / "model.safetensors").unlink()
    with pytest.raises(OSError, match=r"model\.safetensors"):
        LambdaViTForImageClassification.from_pretrained(vit_folder)


class Hostile:
    def __reduce__(self):
        return os.system, ("touch executed",)


def test_a_hostile_pickle_is_refused_and_not_run(vit_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (vit_folder / "model.safetensors").unlink()
    torch.save({"vit.layernorm.weight": Hostile()}, vit_folder / "pytorch_model.bin")
    with pytest.raises(pickle.UnpicklingError):
        LambdaViTForImageClassification.from_pretrained(vit_folder)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("num_labels", [2, 5, 7])
def test_a_head_that_was_drawn_at_random_is_known_until_it_is_trained(vit_folder, tmp_path, num_labels):
    LambdaViTModel.from_pretrained(vit_folder).save_pretrained(tmp_path / "headless")
    model = LambdaViTForImageClassification.from_pretrained(tmp_path / "headless", num_labels=num_labels)
    assert model.newly_initialized_head
    assert copy.deepcopy(model).newly_initialized_head
    assert copy.deepcopy(model).to(torch.bfloat16).newly_initialized_head
    for rounded in (torch.bfloat16, torch.float16):
        assert copy.deepcopy(model).to(rounded).float().newly_initialized_head
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    model(torch.randn(2, 3, 16, 16)).logits.square().sum().backward()
    optimizer.step()
    assert not model.newly_initialized_head


def test_a_new_head_stays_new_in_a_saved_model_until_it_is_trained(vit_folder, tmp_path):
    LambdaViTModel.from_pretrained(vit_folder).save_pretrained(tmp_path / "headless")
    model = LambdaViTForImageClassification.from_pretrained(tmp_path / "headless", num_labels=3)
    model.save_pretrained(tmp_path / "saved")
    again = LambdaViTForImageClassification.from_pretrained(tmp_path / "saved")
    assert again.newly_initialized_head
    with pytest.raises(ValueError, match="saved before any training"):
        load_classifier(str(tmp_path / "saved"))
    with torch.no_grad():
        again.classifier.weight.add_(0.01)
    again.save_pretrained(tmp_path / "trained")
    assert not LambdaViTForImageClassification.from_pretrained(tmp_path / "trained").newly_initialized_head
    assert not load_classifier(str(tmp_path / "trained")).newly_initialized_head


def test_a_new_head_that_was_taken_out_is_no_head(vit_folder):
    model = LambdaViTForImageClassification.from_pretrained(vit_folder, num_labels=3, ignore_mismatched_sizes=True)
    model.classifier = torch.nn.Identity()
    assert not model.newly_initialized_head


def test_a_head_of_the_checkpoint_is_not_new_and_one_of_other_classes_is(vit_folder):
    assert not LambdaViTForImageClassification.from_pretrained(vit_folder).newly_initialized_head
    other = LambdaViTForImageClassification.from_pretrained(vit_folder, num_labels=3, ignore_mismatched_sizes=True)
    assert other.newly_initialized_head
    assert not LambdaViTModel.from_pretrained(vit_folder).newly_initialized_head
