"""The program that measures every family."""

import json

from benchmarks import families
from lambda_vit_hf.models.families import FAMILIES


def test_it_knows_every_family():
    assert set(families.FAMILIES) == set(FAMILIES) - {"siglip", "clip"}, "the towers stand for these"


def test_a_family_is_trained_exported_and_compared(tmp_path, capsys):
    epochs = ["--base_num_train_epochs", "1", "--num_train_epochs", "1", "--warmup_steps", "0"]
    families.main(["--families", "vit", "--sets", "0", "--output", str(tmp_path / "figures.json"), *epochs])
    (row,) = json.loads((tmp_path / "figures.json").read_text())["rows"]
    assert len(row["layers"]) == 2 and 0 < row["after"] <= 1 and row["onnx_difference"] < 1e-4
    assert f"| vit | not tried | {100 * row['before']:.1f} |" in capsys.readouterr().out
