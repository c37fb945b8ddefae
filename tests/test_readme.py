"""What README and documents say is there: commands, code, files, links."""

import ast
import importlib
import re
import shlex
from pathlib import Path

import PIL.Image
import pytest
from transformers import TrainingArguments, ViTImageProcessor

import lambda_vit_cli
from lambda_vit_hf.training.recipes import known_recipes
from tests.small_training import Blobs


ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("examples/*.md")])


def code_blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)


def commands(text: str) -> list[list[str]]:
    """Words of every `lambda-vit ...` in a shell block or between backticks."""
    lines = [line for block in code_blocks(text, "bash") for line in block.replace("\\\n", " ").splitlines()]
    lines += re.findall(r"`(lambda-vit [^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE))
    return [shlex.split(line, comments=True) for line in lines if line.startswith("lambda-vit ")]


def test_the_readme_is_read_in_a_minute():
    assert len(README.splitlines()) <= 150


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_python_code_compiles_and_imports_public_names(document):
    for block in code_blocks(document.read_text(encoding="utf-8"), "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.module.startswith("lambda_vit_hf"):
                module = importlib.import_module(node.module)
                missing = [alias.name for alias in node.names if not hasattr(module, alias.name)]
                assert not missing, f"{node.module} has no {missing}"


def test_the_readmes_code_runs(vit_folder, tmp_path, monkeypatch):
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(vit_folder)
    monkeypatch.chdir(tmp_path)
    args = TrainingArguments(output_dir="run", max_steps=8, save_strategy="no", report_to="none", disable_tqdm=True)
    names = {"args": args, "images": Blobs()}
    for block in code_blocks(README, "python"):
        exec(block.replace("facebook/deit-base-patch16-224", str(vit_folder)), names)
    assert len(names["model"].config.removed_layers) == 2
    assert len(names["classifier"](PIL.Image.new("RGB", (16, 16)))) == 5


def test_the_readme_names_every_command():
    assert {words[1] for words in commands(README)} == set(lambda_vit_cli.COMMANDS)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_named_commands_exist_with_their_options_and_recipes(document, capsys):
    for _, command, *words in commands(document.read_text(encoding="utf-8")):
        if "|" in command:  # several in one
            assert set(command.split("|")) <= set(lambda_vit_cli.COMMANDS)
            continue
        if command.startswith("-") or command == "COMMAND":
            continue
        with pytest.raises(SystemExit) as stopped:
            lambda_vit_cli.main([command, "--help"])
        assert stopped.value.code == 0
        shown = capsys.readouterr().out
        unknown = [word for word in words if word.startswith("--") and not re.search(rf"{word}\b", shown)]
        assert not unknown, f"lambda-vit {command} has no {unknown}"
        if command == "train" and words and words[0].islower() and "." not in words[0]:
            assert words[0] in known_recipes()


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_to_files_lead_somewhere(document):
    text = document.read_text(encoding="utf-8")
    links = [link.split("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]
    assert [link for link in links if link and not (document.parent / link).exists()] == []


def test_make_targets_that_documents_name_exist():
    targets = re.findall(r"^([a-z_-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    for document in DOCUMENTS:
        named = re.findall(r"(?:^|`)make ([a-z-]+)", document.read_text(encoding="utf-8"), flags=re.MULTILINE)
        assert set(named) <= set(targets), document.name


@pytest.mark.parametrize(
    "document", [one for one in DOCUMENTS if one.name not in ("CHANGELOG.md", "data.md")], ids=lambda path: path.name
)
def test_named_source_files_exist(document):
    files = {path.as_posix() for folder in ROOT.iterdir() if folder.name[0] != "." for path in folder.rglob("*")}
    files |= {path.as_posix() for path in ROOT.iterdir()}
    named = re.findall(r"`([\w/]+(?:\.(?:py|json|yaml|ipynb)|/))`", document.read_text(encoding="utf-8"))
    written_by_programs = {"config.json", "lambda_config.json", "metrics.json", "preprocessor_config.json",
                           "selection.json", "trainer_state.json", "serve.py", "site/"}  # fmt: skip
    named = {name.rstrip("/") for name in named if name not in written_by_programs and "NAME" not in name}
    assert [name for name in named if not any(file.endswith("/" + name) for file in files)] == []


def test_the_architecture_names_functions_that_exist():
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    sources = [ROOT / "lambda_vit_cli.py", *ROOT.glob("lambda_vit_hf/**/*.py")]
    code = "\n".join(path.read_text(encoding="utf-8") for path in sources)
    for name in re.findall(r"`(?:\w+\.)?([A-Za-z_]+)`", text):
        if name != "NAME" and ("_" in name.strip("_") or name[0].isupper()):
            assert re.search(rf"\b{name}\b", code), f"{name} is not in the code"
