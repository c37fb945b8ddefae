"""The map of what each layer and pair costs, and attention replaced by linear maps."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks import redundancy_map
from benchmarks.linear_maps import choose_for_linear_maps, with_linear_maps
from lambda_vit_hf.selection.masked_forward import MASKS
from tests.benchmarks.conftest import SHAPE


RECIPE = str(Path(__file__).parents[2] / "trainer_scripts" / "recipes" / "digits.yaml")


def test_a_map_of_every_layer_and_pair(tmp_path, digits_vit, capsys):
    output = tmp_path / "map"
    redundancy_map.main(
        [RECIPE, *SHAPE, "--base_model", digits_vit, "--num_masked_images", "40", "--calibration_size", "32",
         "--use_cpu", "true", "--sets", "2 0", "--best_linear", "1", "--output", str(output)]
    )  # fmt: skip
    figures = json.loads(output.with_suffix(".json").read_text())
    assert figures["sets"] == [[0], [1], [2], [0, 1], [0, 2], [1, 2]], "each is there once"
    assert all(len(figures[mask]) == 6 for mask in MASKS) and len(figures["linear"]) == 4
    assert all(value * 40 == pytest.approx(round(value * 40)) for value in figures["linear"])
    printed = capsys.readouterr().out
    assert printed.count("| 0 2 |") == 1 and output.with_suffix(".png").stat().st_size > 5_000
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
        whole = model(images[1::2]).logits.double().softmax(-1)
    wanted = []
    for _ in range(2):
        changes = {}
        for layer in set(range(6)) - set(wanted):
            with torch.no_grad():
                masked = with_linear_maps(model, images[::2], [*wanted, layer])(images[1::2]).logits
            masked = masked.double().softmax(-1)
            changes[layer] = (whole * (whole / masked).log()).sum().item()
        wanted.append(min(changes, key=changes.get))
    assert choose_for_linear_maps(model, images, 2) == wanted


def test_without_a_base_model_it_says_so(capsys):
    with pytest.raises(SystemExit):
        redundancy_map.main([RECIPE])
    assert "--base_model is missing" in capsys.readouterr().err
