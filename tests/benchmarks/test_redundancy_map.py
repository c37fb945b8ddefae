"""The map of what each layer and pair costs, and attention replaced by linear maps."""

import copy
import json
from pathlib import Path

import pytest
import torch

from benchmarks import linear_maps, redundancy_map
from benchmarks.linear_maps import fit_linear_maps, top1_with_maps
from lambda_vit_hf.selection.masked_forward import MASKS
from tests.benchmarks.conftest import SHAPE


RECIPE = str(Path(__file__).parents[2] / "trainer_scripts" / "recipes" / "digits.yaml")


def test_a_map_of_every_layer_and_pair(tmp_path, digits_vit, capsys):
    output = tmp_path / "map"
    redundancy_map.main(
        [RECIPE, *SHAPE, "--base_model", digits_vit, "--num_masked_images", "40", "--calibration_size", "32",
         "--use_cpu", "true", "--sets", "0 1 2", "--best_linear", "1", "--output", str(output)]
    )  # fmt: skip
    figures = json.loads(output.with_suffix(".json").read_text())
    assert figures["sets"] == [[0], [1], [2], [0, 1], [0, 2], [1, 2], [0, 1, 2]], "the best single layer is there once"
    assert all(len(figures[mask]) == 7 for mask in MASKS) and len(figures["linear"]) == 4
    assert all(value * 40 == pytest.approx(round(value * 40)) for value in figures["linear"])
    printed = capsys.readouterr().out
    assert printed.count("| 0 1 2 |") == 1 and output.with_suffix(".png").stat().st_size > 5_000
    redundancy_map.main([str(output.with_suffix(".json")), "--output", str(tmp_path / "again")])
    assert capsys.readouterr().out == printed and (tmp_path / "again.png").exists()


def test_without_pairs_there_is_no_picture(tmp_path, digits_vit, capsys):
    output = tmp_path / "linear"
    redundancy_map.main(
        [RECIPE, *SHAPE, "--base_model", digits_vit, "--num_masked_images", "20", "--calibration_size", "32",
         "--use_cpu", "true", "--no_pairs", "--best_linear", "2", "--output", str(output)]
    )  # fmt: skip
    sets = json.loads(output.with_suffix(".json").read_text())["sets"]
    assert sets[:3] == [[0], [1], [2]] and [len(one) for one in sets[3:]] == [2]
    assert not output.with_suffix(".png").exists()


def test_layers_are_chosen_for_their_maps(model):
    images = torch.randn(30, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        whole = model(images).logits.double().softmax(-1)
    wanted = []
    for _ in range(2):
        changes = {}
        for layer in set(range(6)) - set(wanted):
            maps = fit_linear_maps(model, images, [*wanted, layer])
            with torch.no_grad():
                masked = linear_maps._logits(model, images, maps).double().softmax(-1)
            changes[layer] = (whole * (whole / masked).log()).sum().item()
        wanted.append(min(changes, key=changes.get))
    assert linear_maps.choose_for_linear_maps(model, images, 2) == wanted


def test_without_a_base_model_it_says_so(capsys):
    with pytest.raises(SystemExit):
        redundancy_map.main([RECIPE])
    assert "--base_model is missing" in capsys.readouterr().err


def test_linear_attention_is_replaced_exactly_and_the_maps_above_know_of_it(model, monkeypatch):
    model, images = copy.deepcopy(model).double(), torch.randn(30, 3, 16, 16, dtype=torch.float64)
    layer = model.encoder_layers[2]
    weight = torch.randn(32, 32, dtype=torch.float64)

    def linear(hidden_states, **kwargs):
        return torch.nn.functional.layer_norm(hidden_states, (32,)) @ weight + 3.0

    monkeypatch.setattr(layer, "attention_branch", linear)
    monkeypatch.setattr(layer, "mix_tokens", lambda x, *args, **kwargs: x + linear(x))
    monkeypatch.setattr("benchmarks.linear_maps.RIDGE", 1e-12)
    maps = fit_linear_maps(model, images, [2])
    torch.testing.assert_close(maps[2][:-1] - maps[2][:-1].mean(0), weight - weight.mean(0), rtol=1e-3, atol=1e-3)
    with torch.no_grad():
        labels = model(images).logits.argmax(-1)
    items = [{"pixel_values": image, "labels": int(label)} for image, label in zip(images, labels, strict=True)]
    assert top1_with_maps(model, items, maps, batch_size=7) == 1.0
    assert top1_with_maps(model, items, {2: torch.zeros_like(maps[2])}) < 1.0
    alone, above = fit_linear_maps(model, images, [4])[4], fit_linear_maps(model, images, [1, 4])[4]
    assert not torch.allclose(alone, above)
