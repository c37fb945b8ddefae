"""What a selection holds, and its files, also those of earlier versions."""

import json

import pytest

from lambda_vit_hf import select_attention_layers
from lambda_vit_hf.selection.select import AttentionSelection


def test_a_selection_survives_json(model, images, tmp_path):
    selection = select_attention_layers(model, images, num_removed_layers=3)
    selection.save(tmp_path / "selection.json")
    assert AttentionSelection.load(tmp_path / "selection.json") == selection


def test_a_selection_of_an_older_version_is_read(tmp_path):
    old = {"layers": [1], "order": [1], "strategy": "nose", "output": "class_head", "mask": "skip",
           "compare": "magnitude", "steps": [{"selected": [], "transfer_entropy": {"0": 2.0, "1": -0.5}, "picked": 1}],
           "block_evaluations": 12}  # fmt: skip
    (tmp_path / "selection.json").write_text(json.dumps(old))
    selection = AttentionSelection.load(tmp_path / "selection.json")
    assert selection.steps[0].transfer_entropy == {0: 2.0, 1: -0.5}
    assert selection.steps[0].stability is None
    assert selection.pair_transfer_entropy == selection.interactions == []
    assert (selection.strategy, selection.output, selection.mask, selection.compare) == (
        "nose", "class_head", "skip", "magnitude",
    )  # fmt: skip


@pytest.mark.parametrize(("strategy", "has_config"), [("given", False), ("my_function", True)])
def test_an_older_selection_by_no_strategy_of_ours_is_read(strategy, has_config):
    old = {"order": [1], "strategy": strategy, "output": "none" if strategy == "given" else "class_token",
           "mask": "skip", "compare": "magnitude", "steps": [], "autocast_dtype": None}  # fmt: skip
    selection = AttentionSelection.from_dict(old)
    assert selection.strategy == strategy
    assert (selection.config is not None) == has_config
    assert AttentionSelection.from_dict(json.loads(json.dumps(selection.to_dict()))) == selection


@pytest.mark.parametrize(
    "change",
    [
        {"layers": [1]}, {"order": []}, {"order": [0, 0]}, {"order": [True, 0]}, {"order": [-1, 0]},
        {"order": [0.0, 2]}, {"config": None}, {"mlp_entropy": None},
        {"steps": [{"selected": [], "transfer_entropy": {"1": 0.0}, "picked": 0}]},
        {"changes": [{"divergence": 0.1, "agreement": 0.9}]},
    ],
    ids=str,
)  # fmt: skip
def test_a_selection_that_contradicts_itself_is_refused(model, images, change):
    saved = json.loads(json.dumps(select_attention_layers(model, images, num_removed_layers=2).to_dict()))
    AttentionSelection.from_dict(saved)
    with pytest.raises(ValueError):
        AttentionSelection.from_dict({**saved, **change})


def test_a_file_holds_the_options_once(model, images):
    saved = select_attention_layers(model, images, num_removed_layers=1).to_dict()
    assert saved["config"]["mask"] == "identity" and not {"mask", "strategy", "output", "compare"} & set(saved)


def test_pairs_are_measured_on_request(model, images):
    model, images = model.double(), images.double()
    model.remove_attention([4])
    selection = select_attention_layers(model, images, num_removed_layers=1, strategy="first", pairs=True)
    pairs, interactions = selection.pair_transfer_entropy, selection.interactions
    assert pairs[4] == [None] * 6 and [row[4] for row in interactions] == [None] * 6
    values = []

    def measure(search):
        values.extend(search.transfer_entropy([[2], [5], [2, 5]]))
        return [0]

    select_attention_layers(model, images, num_removed_layers=1, strategy=measure)
    assert [pairs[2][2], pairs[5][5], pairs[2][5]] == pytest.approx(values, rel=1e-9)
    assert pairs[5][2] == pairs[2][5]
    assert interactions[2][5] == pytest.approx(values[2] - values[0] - values[1], rel=1e-9)
    assert interactions[2][2] is None
