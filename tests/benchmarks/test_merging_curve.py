"""Token merging: what it costs and gains, whole and removed, and fine-tuned beside."""

import json
from pathlib import Path

import pytest
from transformers import ViTImageProcessor

from benchmarks import merging_curve
from lambda_vit_hf import LambdaViTForImageClassification
from tests.benchmarks.conftest import SHAPE


RECIPE = str(Path(__file__).parents[2] / "trainer_scripts" / "recipes" / "digits.yaml")


@pytest.fixture
def removed_vit(digits_vit, tmp_path):
    """Saved without the attention of layer 1, merging 3 tokens in each of the others."""
    model = LambdaViTForImageClassification.from_pretrained(digits_vit, removed_layers=[1])
    model.set_token_merging(3)
    model.save_pretrained(tmp_path / "removed")
    ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(tmp_path / "removed")
    return str(tmp_path / "removed")


def test_a_row_for_each_model_and_r_and_the_same_table_again(digits_vit, removed_vit, tmp_path, capsys):
    output = tmp_path / "new" / "merging"
    merging_curve.main(
        [RECIPE, *SHAPE, "--base_model", digits_vit, "--removed_model", removed_vit, "--fine_tuned", removed_vit,
         "--r", "0", "2", "--num_images", "40", "--batch_size", "8", "--rounds", "3", "--use_cpu", "true",
         "--output", str(output)]
    )  # fmt: skip
    figures = json.loads(output.with_suffix(".json").read_text())
    rows = figures["rows"]
    tuned = f"fine-tuned: {removed_vit}"
    named = [(row["model"], row["r"], row["removed_layers"]) for row in rows]
    assert named == [("whole", 0, []), ("whole", 2, []), ("removed", 0, [1]), ("removed", 2, [1]), (tuned, 3, [1])]
    assert all(row["num_images"] == 40 and row["top1"] * 40 == pytest.approx(round(row["top1"] * 40)) for row in rows)
    assert rows[0]["speedup"] == 1.0 and all(row["images_per_second"] > 0 for row in rows)
    whole, whole_2, removed, removed_2, removed_3 = (row["macs"] for row in rows)
    assert whole > whole_2 > removed_2 > removed_3 and whole > removed > removed_2
    printed = capsys.readouterr().out
    assert printed.count("| whole |") == 2 and output.with_suffix(".png").stat().st_size > 5_000
    merging_curve.main([str(output.with_suffix(".json")), "--output", str(tmp_path / "again")])
    assert capsys.readouterr().out == printed and (tmp_path / "again.png").exists()


def test_merging_is_in_the_top_1_that_is_measured(digits_vit, tmp_path, monkeypatch):
    counted = []
    monkeypatch.setattr(
        merging_curve, "evaluate_model",
        lambda model, images, *args, **kwargs: counted.append(
            model(images[0]["pixel_values"][None], output_hidden_states=True).hidden_states[-1].shape[1]
        ) or {"accuracy": 0.5, "num_images": 1},
    )  # fmt: skip
    options = ["--r", "0", "2", "4", "--start", "1", "--batch_size", "2", "--rounds", "1", "--use_cpu", "true"]
    merging_curve.main([RECIPE, *SHAPE, "--base_model", digits_vit, *options, "--output", str(tmp_path / "merging")])
    assert counted == [17, 13, 9], "blocks 1 and 2 merge"


def test_larger_images_have_more_tokens(digits_vit, tmp_path):
    options = ["--r", "0", "--num_images", "4", "--batch_size", "2", "--rounds", "1", "--use_cpu", "true"]
    macs = []
    for image_size in ("8", "16"):
        output = tmp_path / image_size
        merging_curve.main(
            [RECIPE, *SHAPE, "--base_model", digits_vit, *options, "--image_size", image_size, "--output", str(output)]
        )
        macs.append(json.loads(output.with_suffix(".json").read_text())["rows"][0]["macs"])
    assert macs[1] > 3 * macs[0]
