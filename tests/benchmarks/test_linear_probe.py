"""A linear probe as a class head."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from transformers import BitImageProcessor, Dinov2Config, Dinov2Model

from benchmarks import linear_probe
from lambda_vit_hf import LambdaViTConfig, LambdaViTForImageClassification
from lambda_vit_hf.evaluation.classifier import load_classifier
from lambda_vit_hf.models.families import AutoLambdaModelForImageClassification
from tests.conftest import TINY


@pytest.fixture
def encoder(tmp_path):
    torch.manual_seed(0)
    config = Dinov2Config(image_size=8, patch_size=4, hidden_size=16, num_hidden_layers=2, num_attention_heads=2)
    Dinov2Model(config).save_pretrained(tmp_path / "encoder")
    processor = BitImageProcessor(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})
    processor.save_pretrained(tmp_path / "encoder")
    return str(tmp_path / "encoder")


def test_the_head_is_the_probe_and_the_encoder_as_it_was(encoder, tmp_path, capsys):
    output = tmp_path / "probe"
    linear_probe.main(["trainer_scripts/recipes/digits.yaml", "--model_name_or_path", encoder, "--image_size", "8",
                       "--use_cpu", "true", "--num_train_images", "200", "--num_images", "50",
                       "--output_dir", str(output)])  # fmt: skip
    assert "% of 50 images" in capsys.readouterr().out
    model = load_classifier(str(output), model_class=AutoLambdaModelForImageClassification)
    whole = Dinov2Model.from_pretrained(encoder).state_dict()
    assert all(
        torch.equal(value, whole[name]) for name, value in model.base_model.state_dict().items() if name in whole
    )
    assert not model.newly_initialized_head


@pytest.mark.parametrize("num_labels", [2, 5])
def test_probabilities_are_those_of_scikit_learns_pipeline(num_labels):
    model = LambdaViTForImageClassification(LambdaViTConfig(**{**TINY, "num_labels": num_labels})).eval()
    generator = np.random.default_rng(0)
    features = generator.normal(3.0, 5.0, (60, model.config.hidden_size)).astype(np.float32)
    labels = np.arange(60) % num_labels
    linear_probe.set_probe(model, features, labels)
    pipeline = make_pipeline(StandardScaler(), LogisticRegression(C=linear_probe.STRENGTH, max_iter=2000))
    expected = pipeline.fit(features, labels).predict_proba(features)
    with torch.no_grad():
        found = model.classify(torch.from_numpy(features)).softmax(dim=-1).numpy()
    np.testing.assert_allclose(found, expected, atol=1e-5)
    with pytest.raises(ValueError, match=r"classes \[0\]"):
        linear_probe.set_probe(model, features[labels > 0], labels[labels > 0])
