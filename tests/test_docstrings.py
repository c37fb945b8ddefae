"""Examples in docstrings: those with a prompt give what they say; the others, which need the Hub or data, compile."""

import ast
import doctest
import importlib
import pkgutil
import re

import pytest

import lambda_vit_hf


MODULES = sorted(module.name for module in pkgutil.walk_packages(lambda_vit_hf.__path__, "lambda_vit_hf.")
                 if not module.ispkg)  # fmt: skip
FENCE = re.compile(r"^( *)```python\n(.*?)^ *```", flags=re.DOTALL | re.MULTILINE)


class FencedExamples(doctest.DocTestParser):
    """Does not take the closing fence for output."""

    def parse(self, string, name="<string>"):
        return super().parse(re.sub(r"^ *```\w*$", "", string, flags=re.MULTILINE), name)


def examples(module) -> list[doctest.DocTest]:
    found = doctest.DocTestFinder(parser=FencedExamples(), exclude_empty=True).find(module)
    return [test for test in found if test.examples]


@pytest.mark.parametrize("name", MODULES)
def test_examples_with_a_prompt_give_what_they_say(name):
    module = importlib.import_module(name)
    for test in examples(module):
        test.globs = {}  # a reader has nothing but what the example imports
        said = []
        doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(test, out=said.append)
        assert not said, "".join(said)


def test_there_are_examples_to_run():
    assert sum(len(examples(importlib.import_module(name))) for name in MODULES) >= 7


@pytest.mark.parametrize("name", MODULES)
def test_examples_without_a_prompt_compile(name):
    source = importlib.import_module(name).__loader__.get_source(name)
    for indent, block in FENCE.findall(source):
        if ">>>" not in block:
            ast.parse(re.sub(rf"^{indent}", "", block, flags=re.MULTILINE))
