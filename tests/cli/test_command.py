"""The command `lambda-vit` and what all programs have in common: help, usage, errors in one line."""

import ast
import importlib.util
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from datasets.exceptions import DatasetNotFoundError
from safetensors import SafetensorError

import lambda_vit_cli
from lambda_vit_hf.cli import runner
from lambda_vit_hf.hub.push import PushError


ROOT = Path(__file__).parents[2]
LAUNCHERS = sorted(path for path in (ROOT / "trainer_scripts").glob("*.py") if path.stem != "compare_selections")


def test_help_lists_every_command_and_imports_nothing_heavy():
    hidden = "".join(f"sys.modules[{name!r}] = None\n" for name in ("torch", "transformers", "numpy", "lambda_vit_hf"))
    code = f"import sys\n{hidden}import lambda_vit_cli\nlambda_vit_cli.main(['--help'])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr[-1000:]
    for command in lambda_vit_cli.COMMANDS:
        assert f"\n  {command} " in result.stdout


def test_without_a_command_the_usage_is_printed(capsys):
    with pytest.raises(SystemExit) as stopped:
        lambda_vit_cli.main([])
    assert stopped.value.code == 2 and "usage: lambda-vit COMMAND" in capsys.readouterr().err


def test_an_unknown_command_is_answered_with_the_known_ones(capsys):
    with pytest.raises(SystemExit) as stopped:
        lambda_vit_cli.main(["trian", "digits"])
    assert stopped.value.code == 2
    assert "'trian'" in (message := capsys.readouterr().err) and "benchmark" in message


@pytest.mark.parametrize("command", lambda_vit_cli.COMMANDS)
def test_every_command_has_help_with_a_command_to_paste(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        lambda_vit_cli.main([command, "--help"])
    assert stopped.value.code == 0
    assert (shown := capsys.readouterr().out).startswith(f"usage: lambda-vit {command}")
    assert f"    lambda-vit {command} " in shown


@pytest.mark.parametrize("command", lambda_vit_cli.COMMANDS)
def test_a_command_without_arguments_prints_its_usage(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        lambda_vit_cli.main([command])
    assert stopped.value.code == 2
    assert f"usage: lambda-vit {command}" in capsys.readouterr().err


def test_a_mistyped_value_of_a_field_does_not_print_all_fields(capsys):
    with pytest.raises(SystemExit) as stopped:
        lambda_vit_cli.main(["train", "digits", "--num_train_epochs", "many"])
    assert stopped.value.code == 2
    usage, message = capsys.readouterr().err.splitlines()
    assert usage.startswith("usage: lambda-vit train RECIPE") and "invalid float value: 'many'" in message


@pytest.mark.parametrize(
    "error",
    [
        ValueError("not\nso"),
        FileNotFoundError("not so"),
        PushError("not so"),
        SafetensorError("not so"),
        yaml.YAMLError("not so"),
        DatasetNotFoundError("not so"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_what_is_wrong_with_the_input_is_one_line_and_status_2(error, capsys, monkeypatch):
    def program(argv):
        raise error

    with pytest.raises(SystemExit) as stopped:
        runner.run_program("train", program, [])
    assert stopped.value.code == 2
    assert capsys.readouterr().err == "lambda-vit train: error: not so\n"
    monkeypatch.setenv("LAMBDA_VIT_DEBUG", "1")
    with pytest.raises(type(error)):
        runner.run_program("train", program, [])


@pytest.mark.parametrize("error", [TypeError, KeyError, AttributeError, AssertionError, RuntimeError])
def test_a_bug_keeps_its_traceback(error):
    def program(argv):
        raise error

    with pytest.raises(error):
        runner.run_program("train", program, [])


@pytest.mark.parametrize(("library", "extra"), [("datasets", "train"), ("onnxruntime", "export")])
def test_a_missing_library_is_answered_with_the_extra_that_brings_it(library, extra, capsys):
    def program(argv):
        raise ModuleNotFoundError(f"No module named {library!r}", name=library)

    with pytest.raises(SystemExit):
        runner.run_program("select", program, [])
    assert f"pip install 'lambda-vit-hf[{extra}]'" in capsys.readouterr().err


def test_every_command_has_a_launcher_of_a_few_lines():
    started = set()
    for launcher in LAUNCHERS:
        assert len(launcher.read_text().splitlines()) < 15, launcher
        assert f"trainer_scripts/{launcher.name}" in ast.get_docstring(ast.parse(launcher.read_text()))
        module = importlib.import_module(f"trainer_scripts.{launcher.stem}")
        started.add(module.main.__module__.rpartition(".")[2])
        assert f'run_program("{module.main.__module__.rpartition(".")[2]}", main)' in launcher.read_text()
    assert started == set(lambda_vit_cli.COMMANDS)


def test_no_launcher_hides_a_library_where_their_folder_is_on_the_path():
    # In a process of its own: what other tests import may put folders on this one's path.
    look = "import importlib.util, sys; print([name for name in sys.argv[1:] if importlib.util.find_spec(name)])"
    names = [launcher.stem for launcher in LAUNCHERS]
    assert subprocess.check_output([sys.executable, "-I", "-c", look, *names], text=True) == "[]\n"


def test_a_launcher_reports_an_error_in_one_line(tmp_path, monkeypatch, capsys):
    (tmp_path / "mine").touch()
    monkeypatch.setattr(sys, "argv", ["export.py", "model", "--output_dir", str(tmp_path)])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(ROOT / "trainer_scripts" / "export.py"), run_name="__main__")
    assert stopped.value.code == 2
    message = capsys.readouterr().err
    assert message.startswith("lambda-vit export: error:") and message.count("\n") == 1
