"""The table of several models: figures of the program `evaluate`, costs of each model."""

import json

import pytest
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

from benchmarks import compare_models
from lambda_vit_hf import LambdaViTForImageClassification
from lambda_vit_hf.cli import evaluate


def save_pair(folder, image_size: int = 8):
    """A ViT for digits with random weights, and it without attention in two layers, each in a folder."""
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=4, num_attention_heads=2, intermediate_size=32, image_size=image_size,
        patch_size=4, id2label={index: str(index) for index in range(10)},
    )  # fmt: skip
    ViTForImageClassification(config).save_pretrained(folder / "whole")
    model = LambdaViTForImageClassification.from_pretrained(folder / "whole")
    model.remove_attention([1, 3])
    model.save_pretrained(folder / "removed")
    for name in ("whole", "removed"):
        ViTImageProcessor(size={"height": image_size, "width": image_size}).save_pretrained(folder / name)
    return [str(folder / "whole"), str(folder / "removed")]


def test_each_model_has_its_own_figures(tmp_path, capsys):
    folders = save_pair(tmp_path)
    all_figures = tmp_path / "all.json"
    compare_models.main([*folders, "--dataset_name", "digits", "--rounds", "1", "--output", str(all_figures)])
    shown = capsys.readouterr().out
    rows = json.loads(all_figures.read_text())["rows"]
    for folder, row in zip(folders, rows, strict=True):
        evaluate.main([folder, "--dataset_name", "digits", "--device", "cpu", "--output", str(tmp_path / "one.json")])
        assert row["model"] == folder
        assert row["top1"] == json.loads((tmp_path / "one.json").read_text())["accuracy"]
        assert f"| {folder} | {100 * row['top1']:.2f} |" in shown
    # Each attention: queries, keys, values and output, 16 x 16 with biases, behind a LayerNorm.
    assert rows[0]["parameters"] - rows[1]["parameters"] == 2 * (4 * (16 * 16 + 16) + 2 * 16)
    # Five tokens: four projections, and the two products of attention.
    assert rows[0]["macs"] - rows[1]["macs"] == 2 * (4 * 5 * 16 * 16 + 2 * 5 * 5 * 16)
    assert [row["removed_layers"] for row in rows] == [[], [1, 3]]
    compare_models.main(["--show", str(all_figures)])
    assert capsys.readouterr().out.splitlines()[-5:] == shown.splitlines()[-5:]
    with pytest.raises(SystemExit):
        compare_models.main([])


def test_models_of_different_image_sizes_are_refused(tmp_path):
    folders = [*save_pair(tmp_path / "small"), *save_pair(tmp_path / "large", image_size=16)]
    with pytest.raises(ValueError, match=r"one size, got \[\(8, 8\), \(16, 16\)\]"):
        compare_models.main([*folders, "--dataset_name", "digits"])
