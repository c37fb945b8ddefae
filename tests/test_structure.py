"""The order of files that the README shows is the order of imports."""

import re
from pathlib import Path


ROOT = Path(__file__).parent.parent


def order_in_readme() -> list[str]:
    section = (ROOT / "README.md").read_text().split("each file imports only from those before it:")[1]
    listed = section.split("\n\n")[1]
    return re.findall(r"`(\w+)`", listed)


def test_every_file_is_listed_once():
    files = sorted(path.stem for path in (ROOT / "lambda_vit_hf").glob("*.py") if path.stem != "__init__")
    assert sorted(order_in_readme()) == files


def test_files_import_only_from_files_before_them():
    order = order_in_readme()
    for position, name in enumerate(order):
        code = (ROOT / "lambda_vit_hf" / f"{name}.py").read_text()
        for imported in re.findall(r"^\s*from \.(\w+) import", code, re.MULTILINE):
            assert order.index(imported) < position, f"{name} imports {imported}, which comes later"
