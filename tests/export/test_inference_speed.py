"""What the inference benchmark reports. Never how fast this machine is."""

import json
import statistics

import PIL.Image
import pytest
import torch

from lambda_vit_hf.export import inference_speed
from lambda_vit_hf.export.inference_speed import inference_table, measure_inference
from lambda_vit_hf.export.peak_memory import peak_memory_cpu
from lambda_vit_hf.export.speed_picture import plot_inference
from lambda_vit_hf.export.variants import BenchmarkSetup, build_variant
from tests.conftest import REMOVED


@pytest.fixture
def setup(vit_folder):
    return BenchmarkSetup(model=str(vit_folder), removed_layers=tuple(REMOVED))


@pytest.fixture
def scripted_seconds(monkeypatch):
    """Every variant takes the seconds that are scripted for its turn."""
    scripts = {"transformers fp32": [2.0, 8.0, 4.0], "lambda fp32": [1.0, 2.0, 1.0], "lambda bf16": [0.5, 1.0, 0.5]}
    monkeypatch.setattr(
        inference_speed, "interleave", lambda runs, *args, **kwargs: {key: scripts[key] for key in runs}
    )
    return scripts


def test_speedups_are_medians_of_ratios_round_by_round(setup, scripted_seconds):
    names = ["transformers", "lambda", "lambda+bf16"]
    rows = measure_inference(names, setup, [4], with_memory=False, disable_tqdm=True)["rows"]
    assert [row["speedup"] for row in rows] == [1.0, 4.0, 8.0]  # 2 / 1, 8 / 2, 4 / 1; the ratio of medians is 4 too
    assert [row["speedup_like_for_like"] for row in rows] == [1.0, 4.0, None]
    for row, name in zip(rows, scripted_seconds, strict=True):
        times = scripted_seconds[name]
        assert row["images_per_second"] == 4 / statistics.median(times)
        assert row["latency_ms"] == {"median": 1000 * statistics.median(times), "p95": 1000 * max(times)}


def test_a_run_gives_one_row_per_model_and_batch_size(setup):
    names = ["transformers", "timm+removed", "lambda+removed+folded+prepared"]
    result = measure_inference(names, setup, [2, 1], max_rounds=3, with_memory=False, disable_tqdm=True)
    assert [(row["model"], row["batch_size"]) for row in result["rows"]] == [(n, b) for b in (1, 2) for n in names]
    assert all(row["rounds"] == 3 and row["images_per_second"] > 0 for row in result["rows"])
    assert all(row["max_difference"] < 1e-4 for row in result["rows"])
    assert result["rows"][2]["parameters"] < result["rows"][0]["parameters"]
    assert json.loads(json.dumps(result)) == result
    assert result["environment"]["hardware"]


def test_a_model_that_computes_something_else_stops_the_benchmark(setup, monkeypatch):
    def build(name, setup):
        variant = build_variant(name, setup)
        run = variant.run
        variant.run = (lambda images: run(images) + 0.01) if name == "lambda" else run
        return variant

    monkeypatch.setattr(inference_speed, "build_variant", build)
    with pytest.raises(ValueError, match=r"lambda fp32 is not the function it should be: a logit differs by 0\.01"):
        measure_inference(["transformers", "lambda"], setup, [1], with_memory=False, disable_tqdm=True)


def test_every_name_is_checked_before_any_model_is_built(setup, monkeypatch):
    monkeypatch.setattr(inference_speed, "build_variant", lambda *args: pytest.fail("a model was built"))
    with pytest.raises(ValueError, match="unknown step 'quick'"):
        measure_inference(["transformers", "lambda+quick"], setup, [1], disable_tqdm=True)


def test_accuracy_is_measured_on_given_images(setup, scripted_seconds):
    images = torch.randn(70, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        labels = setup.base_model(images).logits.argmax(dim=1)
    labels[:7] = (labels[:7] + 1) % 5
    result = measure_inference(["transformers"], setup, [1], with_memory=False, labelled=(images, labels),
                               disable_tqdm=True)  # fmt: skip
    assert result["rows"][0]["accuracy"] == pytest.approx(0.9)


def test_labelled_images_of_another_size_are_refused_before_any_model_is_built(setup, monkeypatch):
    monkeypatch.setattr(inference_speed, "build_variant", lambda *args: pytest.fail("a model was built"))
    labelled = torch.zeros(2, 3, 20, 20), torch.zeros(2, dtype=torch.long)
    with pytest.raises(ValueError, match=r"images are of \(3, 20, 20\), but the model's config says \(3, 16, 16\)"):
        measure_inference(["lambda+onnx"], setup, [1], labelled=labelled, disable_tqdm=True)


def test_peak_memory_counts_weights_and_activations():
    setup = BenchmarkSetup(size="small", num_hidden_layers=2, image_size=64)
    whole, compiled = (build_variant(name, setup) for name in ("lambda", "lambda+compiled"))
    few, none = peak_memory_cpu([whole, compiled], setup, 1)
    (many,) = peak_memory_cpu([whole], setup, 256)
    assert none is None, "the compiler's own memory would count"
    assert few > 0.9 * whole.weights_bytes
    # One MLP's activations: 256 images of 17 tokens, 1536 wide, before and after the GELU.
    assert many - few > 2 * 256 * 17 * 1536 * 4 * 0.9


def test_without_proc_the_column_is_empty_and_the_reason_is_said(setup, monkeypatch):
    def no_proc(*args):
        raise OSError("which only Linux has")
        yield

    monkeypatch.setattr(inference_speed, "peak_memory_cpu", no_proc)
    result = measure_inference(["lambda"], setup, [1], max_rounds=1, disable_tqdm=True)
    assert result["rows"][0]["peak_memory_mb"] is None
    assert result["notes"] == ["No peak memory: which only Linux has"]
    assert "peak MB" not in inference_table(result)


def test_peak_memory_gives_up_in_time(setup, monkeypatch):
    monkeypatch.setattr(inference_speed, "peak_memory_cpu", lambda variants, *rest: iter([5_000_000, None]))
    names = ["transformers", "lambda"]
    result = measure_inference(names, setup, [1], max_rounds=1, max_seconds=0.0, disable_tqdm=True)
    assert [row["peak_memory_mb"] for row in result["rows"]] == [5.0, None]
    assert result["notes"] == ["Peak memory of 1 models was left out to save time."]
    assert result["rows"][0]["rounds"] == 1


def row(**changes):
    known = dict(model="lambda", precision="fp32", device="cpu", batch_size=8, images_per_second=20.0, rounds=5)
    known |= dict(latency_ms={"median": 400.0, "p95": 410.0}, speedup=1.5, speedup_like_for_like=None)
    known |= dict(parameters=5_000_000, macs=2_500_000_000, weights_mb=20.0, peak_memory_mb=None)
    return {**known, "max_difference": None, "accuracy": None, **changes}


def test_the_table_leaves_out_columns_without_values():
    table = inference_table({"rows": [row(), row(model="onnx|file", parameters=None, macs=None)]}).splitlines()
    assert table[0] == (
        "| model | precision | batch | images/s | ms, median | ms, p95 | x first | parameters (M) | GMACs"
        " | weights (MB) |"
    )
    assert table[2] == "| `lambda` | fp32 | 8 | 20.0 | 400.0 | 410.0 | 1.50 | 5.00 | 2.50 | 20.0 |"
    assert table[3].startswith(r"| `onnx\|file` |") and "|  |  |" in table[3]


@pytest.mark.parametrize("accuracy", [None, 0.98])
def test_the_picture_is_drawn_with_and_without_accuracy(tmp_path, accuracy):
    rows = [row(accuracy=accuracy), row(model="other", precision="int8", accuracy=accuracy), row(batch_size=1)]
    environment = {"hardware": "a CPU", "date": "2026-11-22"}
    plot_inference({"rows": rows, "environment": environment}, tmp_path / "speed.png")
    with PIL.Image.open(tmp_path / "speed.png") as picture:
        assert picture.width > 500 and len(picture.convert("RGB").getcolors(100_000)) > 3
