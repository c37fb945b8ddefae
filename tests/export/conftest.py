"""A small ViT trained on digits, whole and with removed layers, exported as transformers.js reads it."""

import os
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from sklearn.datasets import load_digits
from torch.nn.functional import cross_entropy
from transformers import ViTImageProcessor

from lambda_vit_hf import LambdaViTConfig, LambdaViTForImageClassification
from lambda_vit_hf.export.serving_folder import export_for_serving


NODE_MODULES = os.environ.get("LAMBDA_VIT_NODE_MODULES")
needs_node_modules = pytest.mark.skipif(
    not NODE_MODULES, reason="LAMBDA_VIT_NODE_MODULES names no folder with transformers.js"
)
if NODE_MODULES and not Path(NODE_MODULES, "node_modules", "@huggingface", "transformers").is_dir():
    raise pytest.UsageError(f"LAMBDA_VIT_NODE_MODULES: {NODE_MODULES} has no node_modules/@huggingface/transformers.")
PROCESSOR = ViTImageProcessor(size={"height": 8, "width": 8})
DIGITS = load_digits()
NUM_PICTURES = 50


def gray_digits() -> list[PIL.Image.Image]:
    """The last digits, 8 x 8 pixels: no resizing changes them."""
    return [PIL.Image.fromarray((one * 255 / 16).astype(np.uint8)) for one in DIGITS.images[-NUM_PICTURES:]]


@torch.no_grad()
def probabilities(model) -> np.ndarray:
    return model(processed(gray_digits())).logits.softmax(dim=1).numpy()


def processed(pictures: list[PIL.Image.Image]) -> torch.Tensor:
    return PROCESSOR([one.convert("RGB") for one in pictures], return_tensors="pt")["pixel_values"]


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    folder, paths = tmp_path_factory.mktemp("pictures"), []
    for index, digit in enumerate(gray_digits()):
        paths.append(str(folder / f"{index}.png"))
        digit.save(paths[-1])
    return paths


def train(model, steps: int) -> None:
    gray = torch.tensor(DIGITS.images[:-NUM_PICTURES], dtype=torch.float32) * 255 / 16
    images = (gray.floor() / 127.5 - 1)[:, None].repeat(1, 3, 1, 1)
    labels, generator = torch.tensor(DIGITS.target[:-NUM_PICTURES]), torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    model.train()
    for _ in range(steps):
        batch = torch.randint(len(images), (64,), generator=generator)
        cross_entropy(model(images[batch]).logits, labels[batch]).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


@pytest.fixture(scope="session")
def exports(tmp_path_factory):
    """
    Folder and PyTorch's answers by name: a small trained ViT, and it without 2 of its 4 attentions, folded; the latter
    also with int8 by scales of images.
    """
    torch.manual_seed(0)
    config = LambdaViTConfig(
        image_size=8, patch_size=2, hidden_size=48, num_hidden_layers=4, num_attention_heads=4, intermediate_size=96,
        initializer_range=0.1, id2label={digit: f"digit {digit}" for digit in range(10)},
        label2id={f"digit {digit}": digit for digit in range(10)},
    )  # fmt: skip
    model, folder, found = LambdaViTForImageClassification(config), tmp_path_factory.mktemp("exports"), {}
    train(model, 300)
    found["whole"] = folder / "whole", probabilities(model)
    export_for_serving(model, PROCESSOR, folder / "whole", int8=True)
    model.remove_attention([0, 2])
    train(model, 150)
    model.fold_removed_attention()
    model.prepare_for_inference()
    found["removed"] = folder / "removed", probabilities(model)
    export_for_serving(model, PROCESSOR, folder / "removed", int8=True)
    found["static"] = folder / "static", found["removed"][1]
    export_for_serving(model, PROCESSOR, folder / "static", int8=True, calibration=processed(gray_digits()))
    return found


def table(answers: list[list[dict]]) -> np.ndarray:
    """Probabilities `(pictures, classes)`."""
    order = [f"digit {digit}" for digit in range(10)]
    scores = [{one["label"]: one["score"] for one in answer} for answer in answers]
    return np.array([[one[label] for label in order] for one in scores])
