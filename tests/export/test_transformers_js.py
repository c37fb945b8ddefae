"""transformers.js in Node runs an exported folder as it is, and answers as PyTorch does.

Runs where LAMBDA_VIT_NODE_MODULES names a folder in which the package was installed:

    npm install --prefix FOLDER --ignore-scripts --save-exact @huggingface/transformers@4.3.2
    LAMBDA_VIT_NODE_MODULES=FOLDER python -m pytest tests/export/test_transformers_js.py
"""

import json
import subprocess
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from transformers import ViTImageProcessor

from lambda_vit_hf import LambdaDinov2Config, LambdaDinov2Model, LambdaViTConfig, LambdaViTModel
from lambda_vit_hf.export.preprocessing import describe_preprocessing
from lambda_vit_hf.export.serving_folder import export_for_serving
from tests.conftest import perturb
from tests.export.conftest import DIGITS, NODE_MODULES, NUM_PICTURES, PROCESSOR, needs_node_modules, table


pytestmark = [pytest.mark.slow, needs_node_modules]


def in_node(**request) -> dict:
    script = Path(__file__).with_name("transformers_js.mjs")
    result = subprocess.run(
        ["node", str(script), NODE_MODULES], input=json.dumps(request), capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr[-2000:]
    return json.loads(result.stdout)


@pytest.mark.parametrize("name", ["whole", "removed"])
def test_probabilities_are_those_of_pytorch(exports, pictures, name):
    folder, expected = exports[name]
    found = table(in_node(folder=str(folder), dtype="fp32", pictures=pictures)["together"])
    accuracy = (expected.argmax(axis=1) == DIGITS.target[-NUM_PICTURES:]).mean()
    print(f"{name}: top-1 {accuracy:.2f}, largest difference of a probability {np.abs(found - expected).max():.2g}")
    assert accuracy > 0.8, "the model has learned something"
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["whole", "removed", "static"])
def test_int8_has_the_same_top_1_whatever_is_in_the_batch(exports, pictures, name):
    folder, expected = exports[name]
    answer = in_node(folder=str(folder), dtype="q8", pictures=pictures)
    together, alone = table(answer["together"]), table(answer["alone"])
    print(f"{name}, int8: largest difference of a probability {np.abs(alone - expected).max():.2g}")
    np.testing.assert_array_equal(alone.argmax(axis=1), expected.argmax(axis=1))
    np.testing.assert_allclose(together, alone, rtol=0, atol=1e-6)


OPTIONS = {
    "plain": {},
    "no resizing": dict(do_resize=False),
    "crop": dict(do_resize=False, do_center_crop=True, crop_size={"height": 5, "width": 6}),
    "crop of more than there is": dict(do_resize=False, do_center_crop=True, crop_size={"height": 11, "width": 10}),
    "bytes": dict(do_rescale=False, image_mean=[120, 110, 100]),
    "another factor": dict(rescale_factor=1 / 127.5),
    "shortest edge, then crop": dict(
        size={"shortest_edge": 8}, do_center_crop=True, crop_size={"height": 7, "width": 8}
    ),
    "another mean": dict(image_mean=[0.1, 0.2, 0.3], image_std=[0.3, 0.4, 0.5]),
    "no normalizing": dict(do_normalize=False),
    **{f"resample {resample}": dict(resample=resample) for resample in range(4)},
}


@pytest.mark.parametrize("options", OPTIONS)
def test_pixel_values_are_those_of_transformers(pictures, tmp_path, options):
    processor = ViTImageProcessor(**{"size": {"height": 8, "width": 8}, **OPTIONS[options]})
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(describe_preprocessing(processor)))
    colored = [str(tmp_path / "colored.png"), *pictures[:2]]
    noise = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    PIL.Image.fromarray(noise).save(colored[0])
    for path, one in zip(colored, in_node(folder=str(tmp_path), pictures=colored)["pixel_values"], strict=True):
        expected = processor(PIL.Image.open(path).convert("RGB"), return_tensors="np")["pixel_values"]
        np.testing.assert_allclose(array(one), expected, rtol=1e-5, atol=1e-5)


def array(answer: dict) -> np.ndarray:
    return np.array(answer["data"]).reshape(answer["dims"])


ENCODERS = {
    "pooler": (LambdaViTModel, LambdaViTConfig),
    "class token as pooled": (LambdaDinov2Model, LambdaDinov2Config),
}


@pytest.mark.parametrize("name", ENCODERS)
def test_features_of_an_encoder_are_those_of_pytorch(pictures, tmp_path, name):
    model_class, config_class = ENCODERS[name]
    torch.manual_seed(0)
    shape = dict(image_size=8, patch_size=2, hidden_size=48, num_hidden_layers=4, num_attention_heads=4)
    model = perturb(model_class(config_class(**shape)))
    model.remove_attention([0, 2])
    model.prepare_for_inference()
    export_for_serving(model, PROCESSOR, tmp_path / "encoder", int8=True, fp16=True)
    images = PROCESSOR([PIL.Image.open(path).convert("RGB") for path in pictures], return_tensors="pt")
    with torch.no_grad():
        expected = model(**images)
    task, folder = "image-feature-extraction", str(tmp_path / "encoder")
    for dtype, tolerance in {"fp32": 1e-4, "fp16": 0.05, "q8": 0.5}.items():
        answer = in_node(folder=folder, dtype=dtype, task=task, pictures=pictures)
        found = {"last_hidden_state": array(answer["features"]), "pooler_output": array(answer["pooled"])}
        for output, value in found.items():
            difference = np.abs(value - expected[output].numpy()).max()
            print(f"{name}, {dtype}: largest difference of {output} {difference:.2g}")
            assert value.shape == expected[output].shape and difference < tolerance
            assert (difference > 1e-4) == (dtype != "fp32"), "another file was run"
