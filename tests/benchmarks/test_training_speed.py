"""What the training benchmark compares: real Trainers, step by step."""

import json

import pytest

from benchmarks import training_speed
from benchmarks.training_speed import PLAIN, measure_training, training_table
from lambda_vit_hf.export.variants import BenchmarkSetup
from tests.conftest import REMOVED


@pytest.fixture
def setup(vit_folder):
    return BenchmarkSetup(model=str(vit_folder), removed_layers=tuple(REMOVED))


@pytest.mark.parametrize("with_guard", [False, True])
def test_both_trainers_step_and_both_phases_are_compared(setup, monkeypatch, with_guard):
    used = []
    compare = training_speed._compare
    monkeypatch.setattr(training_speed, "_compare", lambda phase, steps, *rest: used.append((phase, list(steps)))
                        or compare(phase, steps, *rest))  # fmt: skip
    result = measure_training(setup, batch_size=2, steps=3, with_guard=with_guard)
    # 13 steps: lambda is 1 at step 0 and 0 from step 5 on; three steps of each phase warm up.
    assert dict(used) == {"diluting": [3, 4], "lambda = 0": [8, 9, 10, 11]}
    name = "with the callback" + (" and the guard" if with_guard else "")
    assert {key: len(value) for key, value in result["seconds"].items()} == {PLAIN: 12, name: 12}
    assert all(seconds > 0 for values in result["seconds"].values() for seconds in values)
    assert json.loads(json.dumps(result)) == result
    assert f"| phase | plain step (ms) | step {name} (ms) |" in training_table(result)


def test_ratios_are_taken_pair_by_pair():
    plain, ours = [1.0, 2.0, 10.0, 1.0], [9.0, 2.2, 11.0, 1.1]
    row = training_speed._compare("diluting", range(1, 4), plain, ours)
    assert row["ratio"] == pytest.approx(1.1) and row["steps"] == 3
    assert row["quartiles"] == pytest.approx([1.1, 1.1])
    assert row["limit"] == 1.03
