"""A few of the random bit flips of `bit_flips.py`, at other places in each run; the seed is printed."""

import random

import pytest

from tests.faults.bit_flips import Kind, flip_everywhere, flipped, make_folders, read_export, read_model


@pytest.fixture(scope="module")
def kinds(tmp_path_factory):
    return make_folders(tmp_path_factory.mktemp("flips"))


def test_flipped_bits_are_refused_by_name_or_harmless(kinds):
    seed = random.randrange(10**6)
    print(f"seed {seed}")
    outcomes = flip_everywhere(kinds, 8, seed)
    assert {outcome for counts in outcomes.values() for outcome in counts} <= {"refused by name", "harmless"}


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "preprocessor_config.json"])
def test_without_checksums_the_same_flip_is_not_refused_or_not_by_name(kinds, name):
    # The test above can fail: nothing else looks at most bits.
    folder = kinds["finished model"].folder
    place = (folder / name).read_bytes().rindex(b"1") * 8 if name.endswith("json") else 8 * 50_000
    listed = (folder / "SHA256SUMS").read_bytes()
    (folder / "SHA256SUMS").unlink()
    try:
        expected = read_model(folder)
        with flipped(folder / name, place):
            read_model(folder)
    finally:
        (folder / "SHA256SUMS").write_bytes(listed)
    assert expected


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
    whole = (folder / "model.onnx").read_bytes()
    (folder / "model.onnx").write_bytes(whole + b"\0")
    with pytest.raises(OSError, match=r"model\.onnx"):
        Kind(folder, read_export).read(folder)
    (folder / "model.onnx").write_bytes(whole)
