"""How speed is measured: interleaved, warmed up, by the median. Never how fast this machine is."""

import types
from datetime import date
from importlib.metadata import version

import pytest
import torch
from torch import nn

from lambda_vit_hf.evaluation import throughput as benchmarking
from lambda_vit_hf.evaluation.throughput import (
    describe_environment,
    environment_line,
    images_per_second,
    interleave,
    markdown_table,
    percentile,
    speedup,
)


class Scripted(nn.Module):
    """Takes the scripted seconds on a clock that stands still otherwise, and writes its name into a shared diary."""

    def __init__(self, name, clock, diary, seconds):
        super().__init__()
        self.name, self.clock, self.diary, self.seconds = name, clock, diary, iter(seconds)

    def forward(self, pixel_values):
        self.diary.append((self.name, self.training, torch.is_grad_enabled()))
        self.clock.now += next(self.seconds)


@pytest.fixture
def clock(monkeypatch):
    clock = types.SimpleNamespace(now=0.0)
    monkeypatch.setattr(benchmarking, "time", types.SimpleNamespace(perf_counter=lambda: clock.now))
    return clock


BATCH = torch.zeros(4, 3, 8, 8)


def test_models_take_turns(clock):
    diary = []
    models = {name: Scripted(name, clock, diary, [1.0] * 20) for name in ("before", "after")}
    images_per_second(models, BATCH, rounds=5)
    names = [name for name, _, _ in diary]
    assert names == ["before", "after"] * (5 + 3), "a noisy minute would hit one model only"


def test_models_run_as_they_are_served(clock):
    diary = []
    images_per_second({"a": Scripted("a", clock, diary, [1.0] * 20).train()}, BATCH, rounds=2)
    assert {(training, gradient) for _, training, gradient in diary} == {(False, False)}


def test_warm_up_is_left_out_and_outliers_do_not_count(clock):
    warm_up = [100.0, 100.0, 100.0]
    models = {
        "a": Scripted("a", clock, [], [*warm_up, 2.0, 2.0, 50.0, 1.0, 2.0]),
        "b": Scripted("b", clock, [], [*warm_up, 0.5, 0.5, 0.5, 30.0, 30.0]),
    }
    # Four images in a median of 2 s, and of 0.5 s.
    assert images_per_second(models, BATCH, rounds=5, max_seconds=1000) == {"a": 2.0, "b": 8.0}


def test_real_models_give_a_positive_figure_each():
    models = {"small": nn.Flatten(), "large": nn.Sequential(nn.Flatten(), nn.Linear(192, 10))}
    speed = images_per_second(models, BATCH, rounds=1)
    assert list(speed) == ["small", "large"]
    assert all(isinstance(value, float) and value > 0 for value in speed.values()), speed


def test_the_environment_says_what_a_figure_was_measured_on(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    environment = describe_environment()
    assert sorted(environment) == ["date", "hardware", "torch", "transformers"]
    assert date.fromisoformat(environment["date"]) <= date.today()
    assert {name: environment[name] for name in ("torch", "transformers")} == {
        name: version(name) for name in ("torch", "transformers")
    }
    assert environment["hardware"].endswith(f", threads: {torch.get_num_threads()}")
    assert all(isinstance(value, str) and value for value in environment.values())


def test_a_gpu_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *args: "NVIDIA Test 9000")
    assert describe_environment("cuda")["hardware"] == "NVIDIA Test 9000"


def test_a_system_without_cpuinfo_still_has_a_name(monkeypatch):
    def no_such_file(*args, **kwargs):
        raise FileNotFoundError("/proc/cpuinfo")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(benchmarking, "open", no_such_file, raising=False)
    assert describe_environment()["hardware"].split(", ")[0]


def test_no_round_starts_after_the_time_but_some_run_in_any_case(clock):
    diary = []
    run = Scripted("a", clock, diary, [1.0] * 50)
    seconds = interleave({"a": lambda: run(BATCH)}, rounds=40, warm_up=2, max_seconds=10.5)
    assert seconds == {"a": [1.0] * 9}, "11 rounds of a second, 2 of them to warm up"
    seconds = interleave({"a": lambda: run(BATCH)}, rounds=40, warm_up=2, max_seconds=0.0, min_rounds=4)
    assert seconds == {"a": [1.0] * 4}


def test_a_slow_machine_times_each_model_once_after_one_round_to_warm_up(clock):
    diary = []
    models = {name: Scripted(name, clock, diary, [50.0, 40.0]) for name in ("before", "after")}
    assert images_per_second(models, BATCH, max_seconds=60) == {"before": 0.1, "after": 0.1}
    assert [name for name, _, _ in diary] == ["before", "after"] * 2


def test_a_measurement_that_fails_leaves_the_models_as_they_were(clock):
    model = Scripted("a", clock, [], []).train()
    with pytest.raises(StopIteration):
        images_per_second({"a": model}, BATCH)
    assert model.training


def test_progress_is_told_outside_of_what_is_timed(clock):
    def slow_bar():
        clock.now += 100.0

    run = Scripted("a", clock, [], [1.0] * 5)
    assert interleave({"a": lambda: run(BATCH)}, 3, warm_up=2, after_round=slow_bar) == {"a": [1.0] * 3}


def test_speedup_is_the_median_of_ratios_not_the_ratio_of_medians():
    # The machine was ten times slower in the second round.
    assert speedup([2.0, 20.0, 2.4], [1.0, 10.0, 2.0]) == 2.0
    with pytest.raises(ValueError):
        speedup([1.0], [1.0, 2.0])


def test_percentile_is_one_of_the_values():
    values = [float(value) for value in range(20, 0, -1)]
    assert (percentile(values, 0.95), percentile(values, 0.5), percentile(values, 1.0)) == (19.0, 10.0, 20.0)
    assert percentile([7.0], 0.95) == 7.0


def test_a_table_escapes_what_would_break_it():
    assert markdown_table(["a|b", "c"], [[None, "two\nlines"]]).splitlines() == [
        r"| a\|b | c |", "| --- | --- |", "|  | two lines |"
    ]  # fmt: skip


def test_the_environment_fits_in_a_line():
    line = environment_line({"hardware": "a CPU", "date": "2026-11-22", "torch": "2.15.0", "batch": 8})
    assert line == "(a CPU; 2026-11-22; torch 2.15.0; batch 8)"
