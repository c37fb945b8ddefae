"""Crops of photographs, and what an encoder thinned on them is worth."""

import json

import numpy as np
import PIL.Image
import pytest
import torch
from transformers import Dinov2Config, Dinov2Model, ViTImageProcessor

from benchmarks import encoder_quality, photograph_crops
from lambda_vit_hf import AutoLambdaModel
from tests.conftest import perturb


@pytest.fixture
def photographs(tmp_path):
    """Six pictures, one of them in two sizes, in two folders."""
    generator = np.random.default_rng(0)
    for number in range(6):
        small = PIL.Image.fromarray(generator.integers(0, 256, (6, 9, 3), dtype=np.uint8))
        path = tmp_path / "photographs" / str(number % 2) / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        small.resize((90, 60)).save(path)
    small.resize((180, 120)).save(path.with_name("twice.png"))
    return tmp_path / "photographs"


def test_no_photograph_has_crops_in_both_splits(photographs, tmp_path):
    counts = [photograph_crops.write_crops(photographs, tmp_path / name, 10, 4, size=16, held_out=0.34)
              for name in ("one", "two")]  # fmt: skip
    assert counts == [{"train": 4, "validation": 2}] * 2, "the same picture in another size is another photograph"
    files = sorted(path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*.jpg"))
    assert [str(path.parent) for path in files] == ["train"] * 10 + ["validation"] * 4
    assert all((tmp_path / "one" / path).read_bytes() == (tmp_path / "two" / path).read_bytes() for path in files)
    assert PIL.Image.open(tmp_path / "one" / files[0]).size == (16, 16)


def test_four_encoders_stand_in_one_table(photographs, tmp_path, capsys):
    torch.manual_seed(0)
    shape = dict(image_size=8, patch_size=2, hidden_size=16, num_hidden_layers=4, num_attention_heads=2, mlp_ratio=2)
    perturb(Dinov2Model(Dinov2Config(**shape))).save_pretrained(tmp_path / "whole")
    smaller = AutoLambdaModel.from_pretrained(tmp_path / "whole", removed_layers=[1, 2], fold_removed=True)
    smaller.save_pretrained(tmp_path / "smaller")
    ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(tmp_path / "smaller")
    for number in range(40):
        path = tmp_path / "labelled" / f"{number % 2}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        noise = np.random.default_rng(number).integers(0, 60, (8, 8, 3)) + 180 * (number % 2)
        PIL.Image.fromarray(noise.astype(np.uint8)).save(path)
    encoder_quality.main(
        [str(tmp_path / "whole"), str(tmp_path / "smaller"), "--dataset_dir", str(tmp_path / "labelled"),
         "--photographs", str(photographs), "--num_train", "30", "--output", str(tmp_path / "figures.json")]
    )  # fmt: skip
    shown = capsys.readouterr().out
    figures = json.loads((tmp_path / "figures.json").read_text())
    whole, removed, left_out, trained = figures["rows"]
    assert whole["image_cosine"] == pytest.approx(1) and whole["patch_cosine"] == pytest.approx(1)
    assert whole["linear_probe"] == whole["knn"] == 1.0
    # Here the smaller one was not trained, so it is the second one.
    assert {**removed, "encoder": ""} == {**trained, "encoder": ""}
    assert removed["parameters"] < left_out["parameters"] == whole["parameters"]
    assert left_out["image_cosine"] < 0.999 and left_out["image_cosine"] != removed["image_cosine"]
    encoder_quality.main(["--show", str(tmp_path / "figures.json")])
    assert capsys.readouterr().out.strip() in shown
