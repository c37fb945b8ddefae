"""The program around the benchmarks: its commands, what it prints and writes."""

import importlib.util
import json
from pathlib import Path

import PIL.Image
import pytest

from tests.conftest import REMOVED


ROOT = Path(__file__).parents[2]


def load(name: str):
    spec = importlib.util.spec_from_file_location(f"{name}_program", ROOT / "trainer_scripts" / f"{name}.py")
    program = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(program)
    return program


@pytest.fixture
def common(vit_folder, tmp_path):
    layers = [str(layer) for layer in REMOVED]
    return ["--model", str(vit_folder), "--layers", *layers, "--output_dir", str(tmp_path / "out")]


COMMANDS = {
    "inference": ["--contenders", "transformers", "lambda+removed", "--no_memory", "--max_rounds", "3"],
    "training": ["--batch_size", "2", "--steps", "2"],
    "input": ["--batch_size", "2", "--rounds", "1"],
    "search": ["--num_layers", "1", "--num_images", "20", "--batch_size", "10"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_prints_a_table_and_writes_it(command, common, tmp_path, capsys):
    load("benchmark").main([command, *common, *COMMANDS[command]])
    printed = capsys.readouterr().out
    result = json.loads((tmp_path / "out" / f"{command}.json").read_text())
    assert "| --- |" in printed and result["environment"]["hardware"] in printed
    assert (tmp_path / "out" / f"{command}.md").read_text().strip() in printed
    assert len(result["rows"]) >= 2
    if command == "inference":
        PIL.Image.open(tmp_path / "out" / "inference.png").verify()


def test_without_a_command_inference_is_measured():
    program = load("benchmark")
    assert program.parse_arguments([]).command == "inference"
    assert program.parse_arguments(["--batch_sizes", "4"]).batch_sizes == [4]
    assert program.parse_arguments(["search"]).command == "search"


def test_compile_adds_a_compiled_twin_of_each_torch_contender(common, monkeypatch):
    from lambda_vit_hf.export import inference_speed

    asked = []
    monkeypatch.setattr(inference_speed, "measure_inference", lambda names, *rest: asked.extend(names) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        load("benchmark").main(["--compile", "--contenders", "lambda", "lambda+onnx", "timm+bf16", *common])
    assert asked == ["lambda", "lambda+onnx", "timm+bf16", "lambda+compiled", "timm+bf16+compiled"]


def test_the_default_contenders_make_sense():
    from lambda_vit_hf.export.contenders import parse_contender

    program = load("benchmark")
    for name in (*program.CPU_CONTENDERS, *program.CONTENDERS):
        parse_contender(name)


def test_accuracy_needs_trained_weights():
    with pytest.raises(SystemExit, match="--model"):
        load("benchmark").main(["--dataset_name", "digits", "--contenders", "transformers"])


def test_export_writes_the_folder_and_says_what_it_compared(folder, tmp_path, capsys):
    program = load("export")
    program.main([str(folder), "--output_dir", str(tmp_path / "served"), "--token_merging_r", "2"])
    assert "largest difference of a logit" in capsys.readouterr().out
    assert (tmp_path / "served" / "serve.py").is_file()
    program.main([str(folder), "--output_dir", str(tmp_path / "program"), "--format", "torch_export"])
    assert (tmp_path / "program" / "model.pt2").is_file()
    with pytest.raises(SystemExit, match="not an empty folder"):
        program.main([str(folder), "--output_dir", str(tmp_path / "served")])
