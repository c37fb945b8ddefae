"""A little of the random damage of `bit_flips.py`, at other places in each run; the seed is printed."""

import random

import pytest

from tests.faults.bit_flips import SECRET, damage_everywhere, make_folders, read_export, read_model


@pytest.fixture(scope="module")
def kinds(tmp_path_factory):
    return make_folders(tmp_path_factory.mktemp("flips"))


@pytest.mark.parametrize("cut", [False, True], ids=["flipped bits", "files cut short"])
def test_damage_anywhere_is_refused_by_name_or_harmless(kinds, cut):
    seed = random.randrange(10**6)
    print(f"seed {seed}")
    outcomes = damage_everywhere(kinds, 8, seed, cut)
    assert {outcome for counts in outcomes.values() for outcome in counts} <= {"refused by name", "harmless"}
    assert all(counts["refused by name"] for counts in outcomes.values())


def test_the_hubs_token_is_in_no_file_of_a_run(kinds):
    run = kinds["finished model"].folder
    files = [path for path in run.rglob("*") if path.is_file()]
    assert {"training_args.bin"} == {path.name for path in files if path.name.endswith("args.bin")}
    assert {run, run / "base", kinds["checkpoint"].folder} <= {path.parent for path in files}
    assert any("tfevents" in path.name for path in files)
    assert [str(path) for path in files if SECRET.encode() in path.read_bytes()] == []


@pytest.mark.parametrize(("edit", "value"), [("fold_removed", False), ("num_attention_heads", 1)])
def test_an_edited_config_is_refused(kinds, edit, value):
    folder = kinds["finished model"].folder
    config = folder / "config.json"
    whole = config.read_text()
    config.write_text("".join(
        f'  "{edit}": {str(value).lower()},\n' if f'"{edit}"' in line else line
        for line in whole.splitlines(keepends=True)
    ))  # fmt: skip
    assert config.read_text() != whole
    with pytest.raises(OSError, match=r"config\.json: not the content"):
        read_model(folder)
    config.write_text(whole)


def test_a_swapped_onnx_file_is_refused(kinds):
    folder = kinds["export"].folder
    graph = folder / "onnx" / "model.onnx"
    whole = graph.read_bytes()
    graph.write_bytes(whole + b"\0")
    with pytest.raises(OSError, match=r"model\.onnx"):
        read_export(folder)
    graph.write_bytes(whole)
