"""A small model for digits that no one trained."""

import pytest
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor


SHAPE = "--hidden_size 16 --num_hidden_layers 3 --num_attention_heads 2 --intermediate_size 32".split()


@pytest.fixture
def digits_vit(tmp_path):
    config = ViTConfig(
        image_size=8,
        patch_size=2,
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=32,
        num_labels=10,
    )
    ViTForImageClassification(config).save_pretrained(tmp_path / "vit")
    ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(tmp_path / "vit")
    return str(tmp_path / "vit")
