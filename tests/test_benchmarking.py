"""How speed is measured: interleaved, warmed up, by the median. Never how fast this machine is."""

import types
from datetime import date
from importlib.metadata import version

import pytest
import torch
from torch import nn

from lambda_vit_hf import benchmarking
from lambda_vit_hf.benchmarking import describe_environment, images_per_second


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
    assert images_per_second(models, BATCH, rounds=5) == {"a": 2.0, "b": 8.0}


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
