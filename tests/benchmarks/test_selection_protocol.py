"""The table of what changes NOSE's picks."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks import selection_protocol
from lambda_vit_hf import select_attention_layers
from lambda_vit_hf.selection.masked_forward import MaskedForward
from tests.benchmarks.conftest import SHAPE


RECIPE = str(Path(__file__).parents[2] / "trainer_scripts" / "recipes" / "digits.yaml")


def test_one_row_for_each_change(tmp_path, digits_vit, capsys):
    output = tmp_path / "protocol"
    selection_protocol.main(
        [RECIPE, *SHAPE, "--base_model", digits_vit, "--num_removed", "2", "--num_images", "64", "32",
         "--use_cpu", "true", "--output", str(output)]
    )  # fmt: skip
    rows = json.loads(output.with_suffix(".json").read_text())["rows"]
    assert [row["num_images"] for row in rows] == [64, 32, 64, 64, 64, 64, 64, 64]
    assert rows[-1]["order"] == rows[0]["order"], "64 images are one batch: its own moments are those of all"
    printed = capsys.readouterr().out
    table = printed[printed.index("| changed") :]
    assert "| none: the reference | 64 |" in table and "| 2 of 2 |" in table
    selection_protocol.main([str(output.with_suffix(".json"))])
    assert capsys.readouterr().out.strip() == table.strip()


def test_entropies_of_batches_are_averaged(model):
    images = torch.randn(40, 3, 16, 16, generator=torch.Generator().manual_seed(3))
    found = select_attention_layers(model, images, 2, strategy=selection_protocol.nose_of_batches, batch_size=20).order
    order = []
    for _ in range(2):
        values = {}
        for layer in set(range(6)) - set(order):
            with torch.no_grad():
                forward = MaskedForward(model, "class_head", "identity")(images, [[], [*order, layer]])
                features = [one for _, one in sorted(forward, key=lambda pair: pair[0])]
            entropy = [sum(part.double().std(dim=0, correction=0).log().sum() for part in one.split(20)) / 2
                       for one in features]  # fmt: skip
            values[layer] = abs((entropy[0] - entropy[1]).item())
        order.append(min(values, key=values.get))
    assert found == order


def test_without_a_base_model_it_says_so(capsys):
    with pytest.raises(SystemExit):
        selection_protocol.main([RECIPE])
    assert "--base_model is missing" in capsys.readouterr().err
