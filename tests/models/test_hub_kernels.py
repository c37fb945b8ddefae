"""A config file must not bring code along that the caller did not ask for."""

import json
import sys
from types import ModuleType

import pytest
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
)
from transformers.integrations import hub_kernels

from lambda_vit_hf import (
    LambdaViTConfig,
    LambdaViTForImageClassification,
)


@pytest.fixture
def kernel_calls(monkeypatch):
    """Calls of the loader of Hub kernels, were the `kernels` package installed."""
    calls = []

    def get_kernel(name, *_, **__):
        calls.append(name)
        raise ValueError("the kernels loader was reached")

    fake = ModuleType("kernels")
    fake.get_kernel = get_kernel
    monkeypatch.setitem(sys.modules, "kernels", fake)
    monkeypatch.setattr(hub_kernels, "is_kernels_available", lambda *_, **__: True)
    monkeypatch.setattr(hub_kernels, "get_kernel_hub", get_kernel, raising=False)
    return calls


def with_settings(folder, **settings):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))
    return folder


OPENERS = [AutoConfig, AutoModelForImageClassification, LambdaViTConfig, LambdaViTForImageClassification]


@pytest.mark.parametrize("opener", OPENERS, ids=lambda opener: opener.__name__)
@pytest.mark.parametrize("name", ["attn_implementation", "_attn_implementation"])
@pytest.mark.parametrize("value", ["evil/kernel", "evil/kernel@v1:forward", "paged|evil/kernel", {"": "evil/kernel"}])
def test_a_hub_kernel_named_by_a_file_is_refused(folder, kernel_calls, opener, name, value):
    with pytest.raises(ValueError, match="would run code from the Hub"):
        opener.from_pretrained(with_settings(folder, **{name: value}))
    assert kernel_calls == []


@pytest.mark.parametrize("asked", [{}, {"attn_implementation": "sdpa"}])
def test_a_hub_kernel_under_a_renamed_attribute_is_refused(folder, kernel_calls, asked):
    with_settings(folder, attribute_map={"_attn_implementation": "harmless"}, harmless="evil/kernel")
    with pytest.raises(ValueError, match="would run code from the Hub"):
        AutoModelForImageClassification.from_pretrained(folder, **asked)
    assert kernel_calls == []


def test_a_hub_kernel_named_by_a_vit_or_a_single_file_is_refused(vit_folder, kernel_calls):
    with_settings(vit_folder, attn_implementation="evil/kernel")
    for flags in ({}, {"attention_flags": [False] + [True] * 5}):
        with pytest.raises(ValueError, match="would run code"):
            LambdaViTForImageClassification.from_pretrained(vit_folder, **flags)
    with pytest.raises(ValueError, match="would run code"):
        LambdaViTConfig.from_json_file(vit_folder / "config.json")
    assert kernel_calls == []


@pytest.mark.parametrize("name", ["attn_implementation", "_attn_implementation"])
@pytest.mark.parametrize("opener", [AutoModelForImageClassification, LambdaViTForImageClassification])
def test_what_the_caller_names_replaces_what_the_file_names(folder, kernel_calls, pixel_values, opener, name):
    with_settings(folder, **{name: "evil/kernel"})
    for options in ({}, {"attention_flags": [False, False, False, True, True, False]}):
        model = opener.from_pretrained(folder, attn_implementation="sdpa", **options)
        assert model.config._attn_implementation == "sdpa"
    assert kernel_calls == []


def test_a_hub_kernel_that_the_caller_names_is_left_to_transformers(folder, kernel_calls):
    with pytest.raises(ValueError, match="loader was reached"):
        AutoModelForImageClassification.from_pretrained(folder, attn_implementation="good/kernel")
    assert kernel_calls == ["good/kernel"]
