"""`examples/browser/` in a real Chromium: pictures are dropped and drawn, and the answers are PyTorch's.

Runs where Chromium is installed and LAMBDA_VIT_NODE_MODULES names a folder with transformers.js, as for
`test_transformers_js.py`:

    LAMBDA_VIT_NODE_MODULES=FOLDER python -m pytest tests/export/test_browser.py -s
"""

import base64
import io
import shutil
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from lambda_vit_hf.export.onnx_serving import OnnxImageClassifier
from tests.export.chromium import CHROMIUM, open_page, serve
from tests.export.conftest import NODE_MODULES, needs_node_modules, table


pytestmark = [
    pytest.mark.slow,
    needs_node_modules,
    pytest.mark.skipif(not CHROMIUM, reason="Chromium is not installed"),
]
EXAMPLE = Path(__file__).parents[2] / "examples" / "browser"
NUM_DROPPED = 20
# Until the page says how it went: an error stays in the status, where a user reads it.
ANSWERS = """new Promise((resolve) => {
  const look = () => {
    const rows = [...document.getElementById("answers").rows];
    const status = document.getElementById("status").textContent;
    const textOf = (row) => ({ title: row.title, cells: [...row.cells].map((one) => one.textContent) });
    if (rows.length || /error/i.test(status)) resolve({ status, rows: rows.map(textOf) });
    else setTimeout(look, 10);
  };
  look();
})"""
READY = """new Promise((resolve) => {
  const status = () => document.getElementById("status").textContent;
  const look = () => (status().startsWith("Loading") ? setTimeout(look, 10) : resolve(status()));
  look();
})"""


@pytest.fixture
def address(exports, tmp_path):
    """Of the example, as its README sets it up."""
    for name in ("index.html", "classify.js"):
        shutil.copy(EXAMPLE / name, tmp_path)
    (tmp_path / "node_modules").symlink_to(Path(NODE_MODULES, "node_modules").resolve())
    (tmp_path / "models").symlink_to(exports["whole"][0].parent)
    with serve(tmp_path) as url:
        yield url


@pytest.fixture
def page(address, tmp_path_factory):
    with open_page(tmp_path_factory.mktemp("profile")) as page:
        page.call("Network.enable")
        page.call("Page.enable")
        yield page
        asked = {event["params"]["request"]["url"] for event in page.events
                 if event.get("method") == "Network.requestWillBeSent"}  # fmt: skip
        assert any(url.endswith(".onnx") for url in asked)
        assert all(url.startswith((address, "blob:", "data:")) for url in asked), f"another machine was asked: {asked}"


def load(page, url: str) -> None:
    page.call("Page.navigate", url=url)
    while not any(event.get("method") == "Page.loadEventFired" for event in page.events):
        page.value("0")
    assert page.value(READY) == "Ready."


def middle_of_canvas(page) -> tuple[float, float]:
    box = page.value("(({ x, y, width, height }) => [x + width / 2, y + height / 2])"
                     "(document.getElementById('picture').getBoundingClientRect())")  # fmt: skip
    return tuple(box)


def answers(page) -> dict[str, list[dict]]:
    """Of each model, all classes with their probabilities, best first. The page is emptied for the next picture."""
    found = page.value(ANSWERS)
    assert found["status"] == "Ready."
    page.value("document.getElementById('answers').replaceChildren()")
    by_model = {}
    for row in found["rows"]:
        pairs = [line.rpartition(": ") for line in row["title"].splitlines()]
        name, answer, milliseconds = row["cells"]
        by_model[name] = [{"label": label, "score": float(score)} for label, _, score in pairs]
        assert answer == f"{by_model[name][0]['label']} ({by_model[name][0]['score']:.3f})"
        assert float(milliseconds) > 0
    return by_model


def drop(page, path: str) -> dict[str, list[dict]]:
    x, y = middle_of_canvas(page)
    data = {"items": [], "files": [path], "dragOperationsMask": 1}
    for kind in ("dragEnter", "dragOver", "drop"):
        page.call("Input.dispatchDragEvent", type=kind, x=x, y=y, data=data)
    return answers(page)


def drop_all(page, pictures: list[str]) -> dict[str, np.ndarray]:
    found = [drop(page, path) for path in pictures]
    return {name: table([one[name] for one in found]) for name in ("whole", "removed")}


def test_dropped_pictures_have_the_probabilities_of_pytorch(page, address, exports, pictures):
    load(page, address)
    for name, found in drop_all(page, pictures[:NUM_DROPPED]).items():
        expected = exports[name][1][:NUM_DROPPED]
        print(f"{name}: largest difference of a probability {np.abs(found - expected).max():.2g}")
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)


def test_int8_has_the_same_top_1(page, address, exports, pictures):
    load(page, f"{address}?dtype=q8")
    for name, found in drop_all(page, pictures[:NUM_DROPPED]).items():
        expected = exports[name][1][:NUM_DROPPED]
        print(f"{name}, int8: largest difference of a probability {np.abs(found - expected).max():.2g}")
        np.testing.assert_array_equal(found.argmax(axis=1), expected.argmax(axis=1))
        assert np.abs(found - expected).max() > 1e-4, "this is not the file in float32"


def test_what_is_drawn_is_answered_as_python_answers_it(page, address, exports, pictures):
    load(page, address)
    drop(page, pictures[0])  # a picture that was dropped before does not come back
    page.call("Runtime.evaluate", expression="document.getElementById('clear').click()")
    x, y = middle_of_canvas(page)
    for kind, height in (("mousePressed", -90), ("mouseMoved", 0), ("mouseMoved", 90), ("mouseReleased", 90)):
        page.call("Input.dispatchMouseEvent", type=kind, x=x, y=y + height, button="left", buttons=1, clickCount=1)
    found = answers(page)
    url = page.value("document.getElementById('picture').toDataURL()")
    with PIL.Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))) as drawn:
        assert drawn.size == (256, 256) and drawn.convert("L").getextrema() == (0, 255)
        for name in ("whole", "removed"):
            ((best, *_),) = OnnxImageClassifier(exports[name][0], num_threads=1).classify([drawn])
            print(f"{name}: drawn {found[name][0]}, in Python {best}")
            assert found[name][0]["label"] == best["label"]
