"""`SHA256SUMS`: every change of a listed file is found by name, other files are nobody's business."""

import os
import random
import shutil
import subprocess

import pytest

from lambda_vit_hf.models.checksums import (
    MANIFEST,
    check_checksums,
    find_damage,
    remove_checksums,
    write_checksums,
)


@pytest.fixture
def folder(tmp_path):
    for name in ("config.json", "model.safetensors", "optimizer.pt", "modeling.py"):
        (tmp_path / name).write_bytes(name.encode() * 100)
    (tmp_path / "README.md").write_text("a card")
    (tmp_path / "base").mkdir()
    write_checksums(tmp_path)
    return tmp_path


def test_a_folder_as_it_was_finished_is_whole(folder):
    assert find_damage(folder) is None
    check_checksums(folder)
    assert sorted(path.name for path in folder.iterdir() if path.name.startswith(".")) == []


def test_the_list_is_in_the_form_of_sha256sum(folder):
    lines = (folder / MANIFEST).read_text().splitlines()
    assert [line.split("  ")[1] for line in lines] == ["config.json", "model.safetensors", "modeling.py",
                                                       "optimizer.pt"]  # fmt: skip
    if shutil.which("sha256sum"):
        subprocess.run(["sha256sum", "--check", "--strict", MANIFEST], cwd=folder, check=True, capture_output=True)


def test_cards_logs_and_new_files_may_change(folder):
    (folder / "README.md").write_text("a better card")
    (folder / "train.log").write_text("...")
    (folder / "extra.json").write_text("{}")
    assert find_damage(folder) is None


def test_a_folder_without_a_list_is_taken_as_it_is(folder):
    remove_checksums(folder)
    remove_checksums(folder)
    (folder / "config.json").write_text("{")
    assert find_damage(folder) is None


def test_any_flipped_bit_is_refused_by_name(folder):
    generator = random.Random(0)
    for name in ("config.json", "model.safetensors", "optimizer.pt", "modeling.py"):
        whole = (folder / name).read_bytes()
        place = generator.randrange(8 * len(whole))
        damaged = bytearray(whole)
        damaged[place // 8] ^= 1 << place % 8
        (folder / name).write_bytes(damaged)
        with pytest.raises(OSError, match=f"{name}.*delete {MANIFEST}"):
            check_checksums(folder)
        (folder / name).write_bytes(whole)
    assert find_damage(folder) is None


def test_a_listed_file_that_is_gone_is_damage_where_the_folder_must_be_complete(folder):
    (folder / "optimizer.pt").unlink()
    assert "optimizer.pt" in find_damage(folder)
    assert find_damage(folder, is_complete=False) is None
    (folder / "config.json").write_text("{}")
    assert "config.json" in find_damage(folder, is_complete=False)


@pytest.mark.parametrize("content", [b"", b"\n", b"\xff\xfe", b"no digest", b"0" * 64 + b"  ../../etc/passwd\n"])
def test_a_damaged_list_is_refused(folder, content):
    (folder / MANIFEST).write_bytes(content)
    assert find_damage(folder) == f"{MANIFEST} is damaged"


def test_what_is_listed_is_on_the_disk_before_the_list_appears(folder, monkeypatch):
    remove_checksums(folder)
    synced = []

    def sync(descriptor):
        names = {path.stat().st_ino: path.name for path in [folder, *folder.iterdir()]}
        synced.append(names[os.fstat(descriptor).st_ino])
        assert (folder / MANIFEST).exists() == (synced[-1] == folder.name)

    monkeypatch.setattr(os, "fsync", sync)
    write_checksums(folder)
    listed = [line.split()[1] for line in (folder / MANIFEST).read_text().splitlines()]
    assert set(listed) == set(synced[:-2])
    assert synced[-2].startswith(f".{MANIFEST}") and synced[-1] == folder.name
