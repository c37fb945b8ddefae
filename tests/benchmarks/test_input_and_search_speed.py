"""The two smaller benchmarks: image input against the model, prefix reuse against the naive search."""

import json

import pytest

from benchmarks import input_speed, search_speed
from benchmarks.input_speed import PHOTOGRAPH_SIZE, input_table, measure_input, write_photographs
from benchmarks.search_speed import measure_search, search_table
from lambda_vit_hf.export.variants import BenchmarkSetup
from tests.conftest import REMOVED


@pytest.fixture
def setup(vit_folder):
    return BenchmarkSetup(model=str(vit_folder), removed_layers=tuple(REMOVED))


def test_photographs_are_jpegs_of_imagenets_size_and_all_different(tmp_path):
    photographs = write_photographs(tmp_path, 5)
    files = sorted(tmp_path.glob("*.jpg"))
    assert len({file.read_bytes() for file in files}) == len(photographs) == 5
    assert all(image.format == "JPEG" and image.size == PHOTOGRAPH_SIZE for image in photographs["image"])
    assert all(50_000 < file.stat().st_size < 200_000 for file in files)


def test_input_measures_reading_and_training(setup):
    result = measure_input(setup, batch_size=2, rounds=1)
    assert len(result["rows"]) == 4 and all(row["images_per_second"] > 0 for row in result["rows"])
    assert result["rows"][1]["name"].startswith("training: decode")
    assert json.loads(json.dumps(result)) == result
    assert f"as {result['cores_needed']:.2f} cores prepare" in input_table(result)


@pytest.mark.parametrize(("reading", "training", "limit"), [(10.0, 1.0, "reading"), (1.0, 10.0, "the model")])
def test_input_says_which_one_limits(setup, monkeypatch, reading, training, limit):
    monkeypatch.setattr(
        input_speed,
        "interleave",
        lambda runs, *args, **kwargs: {name: [training if "step" in name else reading] for name in runs},
    )
    result = measure_input(setup, batch_size=2, rounds=1)
    assert result["limit"] == limit
    assert result["cores_needed"] == pytest.approx(reading / training)


def test_search_with_and_without_reuse_finds_the_same_layers(setup, monkeypatch):
    clock = iter([0.0, 3.0, 10.0, 16.0])
    monkeypatch.setattr(search_speed.time, "perf_counter", lambda: next(clock, 99.0))
    result = measure_search(setup, num_layers=2, num_images=20, batch_size=10, disable_tqdm=True)
    reused, naive = result["rows"]
    assert reused["order"] == naive["order"] and len(naive["order"]) == 2
    assert (reused["seconds"], naive["seconds"], result["ratio"]) == (3.0, 6.0, 0.5)
    assert reused["block_evaluations"] < naive["block_evaluations"]
    assert result["block_ratio"] == reused["block_evaluations"] / naive["block_evaluations"]
    assert "| ratio | 0.500 |" in search_table(result)
