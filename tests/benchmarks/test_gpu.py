"""The GPU benchmark, on a CPU: every part runs, is written, and may fail alone."""

import json

import pytest
import torch

from benchmarks import gpu


def test_a_part_of_each_kind_runs_and_is_written(tmp_path, capsys, monkeypatch):
    every = list(gpu.parts("cpu", dry_run=True))
    kinds = {part.title.split(",")[0]: part for part in reversed(every)}
    assert len(every) == 9 and set(kinds) == {"inference", "training", "search"}
    monkeypatch.setattr(gpu, "parts", lambda *args: kinds.values())
    gpu.main(["--dry_run", "--output_dir", str(tmp_path)])
    figures, text = json.loads((tmp_path / "gpu.json").read_text()), (tmp_path / "gpu.md").read_text()
    assert text.count("\n## ") + text.startswith("## ") == len(figures) == 3
    rows = figures["inference, bf16, 5 of 12 removed"]["rows"]
    assert {row["model"] for row in rows} == set(gpu.EAGER) and {row["precision"] for row in rows} == {"bf16"}
    assert text.splitlines()[2] in capsys.readouterr().out


def test_a_part_that_fails_is_named_and_costs_no_other(tmp_path, monkeypatch):
    def out_of_memory():
        raise torch.OutOfMemoryError("CUDA out of memory")

    fine = {"environment": {"hardware": "a", "date": "b", "torch": "c", "transformers": "d"}}
    both = [gpu.Part("first", out_of_memory, str), gpu.Part("second", lambda: fine, lambda result: "a table")]
    monkeypatch.setattr(gpu, "parts", lambda *args: both)
    with pytest.raises(SystemExit, match="first: CUDA out of memory"):
        gpu.main(["--dry_run", "--output_dir", str(tmp_path)])
    assert list(json.loads((tmp_path / "gpu.json").read_text())) == ["second"]


def test_without_a_gpu_it_says_so(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        gpu.main([])
    assert "--dry_run" in capsys.readouterr().err
