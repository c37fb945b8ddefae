"""What `import lambda_vit_hf` offers, to people, editors and type checkers."""

import ast
import importlib
from pathlib import Path

import pytest
from transformers import AutoConfig

import lambda_vit_hf


SOURCE = Path(lambda_vit_hf.__file__).read_text(encoding="utf-8")


def test_dir_lists_the_public_names_and_each_can_be_imported():
    assert set(lambda_vit_hf.__all__) <= set(dir(lambda_vit_hf))
    for name in lambda_vit_hf.__all__:
        assert getattr(lambda_vit_hf, name).__name__ == name
    assert lambda_vit_hf.__version__.count(".") == 2


def test_a_type_checker_sees_every_public_name_where_it_is_defined():
    imported = {
        alias.name: node.module
        for node in ast.walk(ast.parse(SOURCE))
        if isinstance(node, ast.ImportFrom) and node.level == 1
        for alias in node.names
    }
    del imported["register_auto_classes"]  # what importing does
    assert sorted(imported) == sorted(lambda_vit_hf.__all__)
    for name, module in imported.items():
        found = getattr(importlib.import_module(f"lambda_vit_hf.{module}"), name)
        assert found is getattr(lambda_vit_hf, name), f"{name} is imported from another module at run time"


def test_importing_the_package_registers_its_models():
    assert type(AutoConfig.for_model("lambda_vit")).__name__ == "LambdaViTConfig"


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'EntropyGuidedRemoval'"):
        lambda_vit_hf.EntropyGuidedRemoval  # noqa: B018
    with pytest.raises(ImportError, match="cannot import name 'Entropy'"):
        from lambda_vit_hf import Entropy  # noqa: F401
