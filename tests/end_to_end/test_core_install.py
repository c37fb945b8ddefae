"""A served model needs the core only: nothing of the `train` extra may be imported for it."""

import subprocess
import sys

from transformers import ViTImageProcessor


SERVE = """
import sys

for name in ("accelerate", "datasets", "evaluate", "jinja2", "matplotlib", "peft", "sklearn", "timm"):
    sys.modules[name] = None  # as if it were not installed
import PIL.Image
import torch
import lambda_vit_hf
from transformers import pipeline

answer = pipeline("image-classification", model=sys.argv[1])(PIL.Image.new("RGB", (20, 20)))
assert len(answer) == 5, answer
model = lambda_vit_hf.LambdaViTForImageClassification.from_pretrained(sys.argv[1])
print(lambda_vit_hf.select_attention_layers(model, torch.randn(8, 3, 16, 16), num_removed_layers=1).layers)
"""


def test_the_core_alone_serves_and_selects(model, tmp_path):
    model.remove_attention([0, 2])
    model.save_pretrained(tmp_path)
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(tmp_path)
    result = subprocess.run([sys.executable, "-c", SERVE, str(tmp_path)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout.strip().endswith("]")
