"""The programs around the benchmarks: what they print and write."""

import json
from pathlib import Path

import PIL.Image
import pytest

from benchmarks import input_speed, search_speed, training_speed
from lambda_vit_hf.cli import benchmark
from lambda_vit_hf.export import inference_speed
from lambda_vit_hf.export.variants import parse_variant
from tests.conftest import REMOVED


@pytest.fixture
def common(vit_folder, tmp_path):
    layers = [str(layer) for layer in REMOVED]
    return ["--model", str(vit_folder), "--removed_layers", *layers, "--output_dir", str(tmp_path / "out")]


PROGRAMS = {
    "inference": (benchmark, ["--variants", "transformers", "lambda+removed", "--no_memory", "--max_rounds", "3"]),
    "training": (training_speed, ["--batch_size", "2", "--steps", "2"]),
    "input": (input_speed, ["--batch_size", "2", "--rounds", "1"]),
    "search": (search_speed, ["--num_layers", "1", "--num_images", "20", "--batch_size", "10"]),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_each_program_prints_a_table_and_writes_it(name, common, tmp_path, capsys):
    program, options = PROGRAMS[name]
    program.main([*common, *options])
    printed = capsys.readouterr().out
    result = json.loads((tmp_path / "out" / f"{name}.json").read_text())
    assert "| --- |" in printed and result["environment"]["hardware"] in printed
    assert (tmp_path / "out" / f"{name}.md").read_text().strip() in printed
    assert len(result["rows"]) >= 2
    if name == "inference":
        PIL.Image.open(tmp_path / "out" / "inference.png").verify()


def test_without_an_option_it_says_how_to_use_it(capsys):
    with pytest.raises(SystemExit) as stopped:
        benchmark.main([])
    assert stopped.value.code == 2 and "usage: lambda-vit benchmark" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--batch_sizes", "--num_images", "--max_rounds"])
def test_none_of_something_is_refused(option, capsys):
    with pytest.raises(SystemExit):
        benchmark.parse_arguments(["--size", "tiny", option, "0"])
    assert "must be 1 or more" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_is_found_before_anything_is_measured(tmp_path, monkeypatch):
    (tmp_path / "taken").write_text("mine")
    monkeypatch.setattr(inference_speed, "measure_inference", lambda *_: 1 / 0)
    with pytest.raises(FileExistsError, match="taken"):
        benchmark.main(["--variants", "transformers", "--output_dir", str(tmp_path / "taken")])


def test_only_its_own_result_is_shown_again(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"config\.json is no inference\.json"):
        benchmark.main(["--show", str(tmp_path / "config.json")])


def test_the_first_words_of_before_are_understood(capsys):
    assert benchmark.parse_arguments(["inference", "--batch_sizes", "4"]).batch_sizes == [4]
    with pytest.raises(SystemExit):
        benchmark.parse_arguments(["training", "--steps", "3"])
    assert "python -m benchmarks.training_speed" in capsys.readouterr().err
    with pytest.warns(FutureWarning, match="--contenders is called --variants now"):
        assert benchmark.parse_arguments(["--contenders", "timm"]).variants == ["timm"]


def test_compile_adds_a_compiled_twin_of_each_torch_variant(common, monkeypatch):
    measured = []
    monkeypatch.setattr(inference_speed, "measure_inference", lambda names, *rest: measured.extend(names) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        benchmark.main(["--compile", "--variants", "lambda", "lambda+onnx", "timm+bf16", *common])
    assert measured[:5] == ["lambda", "lambda+onnx", "timm+bf16", "lambda+compiled", "timm+bf16+compiled"]
    assert measured[5:] == ["transformers", "transformers+onnx", "transformers+bf16", "transformers+compiled",
                            "transformers+bf16+compiled"]  # fmt: skip


def test_the_default_variants_make_sense():
    for name in (*benchmark.CPU_VARIANTS, *benchmark.VARIANTS, *benchmark.ENGINE_VARIANTS,
                 *benchmark.OPENVINO_VARIANTS):  # fmt: skip
        parse_variant(name)


def test_accuracy_needs_trained_weights(capsys):
    with pytest.raises(SystemExit):
        benchmark.main(["--dataset_name", "digits", "--variants", "transformers"])
    assert "--model" in capsys.readouterr().err


def test_figures_of_before_are_printed_and_drawn_again(tmp_path, capsys):
    figures = Path(__file__).parents[2] / "results" / "benchmark_engines_cpu.json"
    benchmark.main(["--show", str(figures), "--output_dir", str(tmp_path / "new")])
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| `")]
    assert len(rows) == 36 and "transformers+onnx+int8" in "".join(rows)
    assert (tmp_path / "new" / "inference.png").stat().st_size > 10_000
