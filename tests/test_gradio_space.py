"""The Gradio Space starts, and answers a picture as the models do.

Runs where LAMBDA_VIT_GRADIO_PYTHON names a Python that has gradio and this package's dependencies: gradio 6 asks for
Pillow below 13, so it is not among the packages that tests install.
"""

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from transformers import ViTImageProcessor

from lambda_vit_hf import LambdaViTConfig, LambdaViTForImageClassification


ROOT = Path(__file__).parents[1]
PYTHON = os.environ.get("LAMBDA_VIT_GRADIO_PYTHON")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON, reason="LAMBDA_VIT_GRADIO_PYTHON names no Python with gradio"),
]
# Started as a server and asked over HTTP, as a visitor's browser does.
ASK = """
import json, runpy, sys
from gradio_client import Client, handle_file
page = runpy.run_path("examples/gradio_space/app.py")["build_page"]()
_, url, _ = page.launch(prevent_thread_lock=True, server_name="127.0.0.1", quiet=True)
answer = Client(url, verbose=False).predict(handle_file(sys.argv[1]), api_name="/classify")
print("ANSWER" + json.dumps(answer))
page.close()
"""


def test_the_space_answers_as_the_models_do(tmp_path):
    torch.manual_seed(0)
    shape = dict(image_size=8, patch_size=2, hidden_size=16, num_hidden_layers=3, num_attention_heads=2,
                 intermediate_size=32, num_labels=5, initializer_range=0.3)  # fmt: skip
    processor = ViTImageProcessor(size={"height": 8, "width": 8})
    picture = PIL.Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8))
    picture.save(tmp_path / "picture.png")
    expected, variables = [], {}
    for name, removed in (("whole", []), ("removed", [0, 2])):
        model = LambdaViTForImageClassification(LambdaViTConfig(**shape)).eval()
        if removed:
            model.remove_attention(removed)
        model.save_pretrained(tmp_path / name)
        processor.save_pretrained(tmp_path / name)
        variables[f"{name.upper()}_MODEL"] = str(tmp_path / name)
        with torch.no_grad():
            scores = model(**processor(picture, return_tensors="pt")).logits.softmax(dim=1)[0]
        expected.append({model.config.id2label[index]: score for index, score in enumerate(scores.tolist())})
    environment = {**os.environ, **variables, "PYTHONPATH": str(ROOT), "GRADIO_ANALYTICS_ENABLED": "False"}
    result = subprocess.run([PYTHON, "-c", ASK, str(tmp_path / "picture.png")], cwd=ROOT, env=environment,
                            capture_output=True, text=True, timeout=240)  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    *labels, times = json.loads(result.stdout.split("ANSWER")[1].splitlines()[0])
    for answer, scores in zip(labels, expected, strict=True):
        best = sorted(scores, key=scores.get, reverse=True)[:3]
        assert [one["label"] for one in answer["confidences"]] == best and answer["label"] == best[0]
        for one in answer["confidences"]:
            assert one["confidence"] == pytest.approx(scores[one["label"]], abs=1e-5)
    assert [name for name, _ in times["data"]] == ["whole", "removed"]
    assert all(float(milliseconds) > 0 for _, milliseconds in times["data"])
