"""Gains by resolution: like for like, and beside what arithmetic promises."""

import json
from pathlib import Path

import pytest
import torch
from transformers import Dinov2ForImageClassification, ViTForImageClassification

from benchmarks import resolution_speed
from benchmarks.resolution_speed import (
    MODELS,
    build_model,
    measure_peak_memory,
    measure_resolutions,
    memory_table,
    resolution_table,
)


SHAPE = dict(patch_size=4, hidden_size=32, num_hidden_layers=4, num_attention_heads=4)
TINY = {"vit": ("vit", {**SHAPE, "intermediate_size": 64}), "dinov2": ("dinov2", SHAPE)}


@pytest.fixture(scope="module")
def result():
    return measure_resolutions(TINY, (8, 34), (1, 3), batch_size=1, max_rounds=3, disable_tqdm=True)


WHOLE = {"vit": ViTForImageClassification, "dinov2": Dinov2ForImageClassification}


@pytest.mark.parametrize("family", WHOLE)
def test_the_whole_model_is_transformers_and_differs_in_removed_attention_alone(family):
    models = {number: build_model(*TINY[family], 8, number) for number in (0, 1, 3)}
    assert type(models[0]) is WHOLE[family] and models[0].config._attn_implementation == "sdpa"
    assert [models[number].config.removed_layers for number in (1, 3)] == [[0], [0, 1, 3]]
    assert all(model.config._attn_implementation == "sdpa" and not model.training for model in models.values())
    assert {parameter.dtype for model in models.values() for parameter in model.parameters()} == {torch.float32}
    for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "image_size", "num_labels"):
        assert len({getattr(model.config, name) for model in models.values()}) == 1, name


def test_each_size_has_a_whole_model_to_compare_with(result):
    rows = [(row["model"], row["image_size"], row["num_removed"]) for row in result["rows"]]
    assert rows == [(name, size, number) for name in TINY for size in (8, 34) for number in (0, 1, 3)]
    assert all(row["gain"] == row["macs_gain"] == 1 for row in result["rows"] if row["num_removed"] == 0)
    assert all(row["gain"] > 0 and row["rounds"] == 3 for row in result["rows"])
    assert [row["tokens"] for row in result["rows"][::3]] == [5, 65, 5, 65], "34 pixels hold 8 patches of 4"
    assert json.loads(json.dumps(result)) == result


def test_by_arithmetic_removal_gains_more_on_larger_images(result):
    gains = {(row["model"], row["image_size"], row["num_removed"]): row["macs_gain"] for row in result["rows"]}
    for name in TINY:
        assert 1 < gains[name, 8, 1] < gains[name, 8, 3] < gains[name, 34, 3]
        assert gains[name, 8, 1] < gains[name, 34, 1]


def test_the_program_writes_figures_table_and_picture(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(MODELS, "vit_base", TINY["vit"])
    options = ["--models", "vit_base", "--image_sizes", "8", "--num_removed", "2", "--batch_size", "1"]
    resolution_speed.main([*options, "--max_rounds", "3", "--output_dir", str(tmp_path)])
    assert {path.name for path in tmp_path.iterdir()} == {"resolution.json", "resolution.md", "resolution.png"}
    written = json.loads((tmp_path / "resolution.json").read_text(encoding="utf-8"))
    assert resolution_table(written) in capsys.readouterr().out
    whole, removed = resolution_table(written).splitlines()[2:]
    assert whole.endswith("| 1.00 | 1.00 |  |") and removed.startswith("| vit_base | 8 | 5 | 2 |")


def test_layers_that_are_not_there_are_refused():
    with pytest.raises(ValueError, match="1 to 6"):
        measure_resolutions(TINY, (8,), (7,), disable_tqdm=True)
    with pytest.raises(ValueError, match="1 to 6"):
        measure_resolutions(TINY, (8,), (0,), disable_tqdm=True)
    with pytest.raises(ValueError, match="1 to 6"):
        measure_peak_memory(TINY, (8,), (7,), disable_tqdm=True)


def test_peak_memory_grows_with_images_and_shrinks_with_weights(tmp_path, monkeypatch, capsys):
    # 24 M parameters, of which attention has a third: in float32 96 MB, without 4 of 6 layers 75 MB.
    shape = dict(patch_size=16, hidden_size=576, num_hidden_layers=6, num_attention_heads=9, intermediate_size=2304)
    monkeypatch.setitem(MODELS, "vit_base", ("vit", shape))
    options = ["--models", "vit_base", "--image_sizes", "32", "512", "--num_removed", "4", "--batch_size", "4"]
    resolution_speed.main([*options, "--peak_memory", "--output_dir", str(tmp_path)])
    printed = capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {"memory.json", "memory.md"}
    rows = json.loads((tmp_path / "memory.json").read_text(encoding="utf-8"))["rows"]
    small, small_removed, large, _ = rows
    assert [(row["image_size"], row["num_removed"]) for row in rows] == [(32, 0), (32, 4), (512, 0), (512, 4)]
    assert small["peak_bytes"] > small["weights_bytes"] > small_removed["weights_bytes"] + 20e6
    assert small_removed["peak_bytes"] < small["peak_bytes"] - 15e6
    assert large["peak_bytes"] > small["peak_bytes"] + 4 * 1025 * 2304 * 4, "one activation inside the MLP at least"
    resolution_speed.main(["--show", str(tmp_path / "memory.json")])
    assert memory_table({"rows": rows}) in printed and memory_table({"rows": rows}) in capsys.readouterr().out


def test_figures_of_before_are_printed_again(capsys):
    files = sorted(Path(__file__).parents[2].glob("results/resolution_*.json"))
    resolution_speed.main(["--show", *map(str, files)])
    printed = capsys.readouterr().out
    assert "| dinov2_small | 1022 | 5330 | 6 |" in printed and "| vit_base | 518 |" in printed
