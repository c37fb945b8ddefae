"""Nothing that answers in NaN or infinity is called finished, whichever way it goes."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from lambda_vit_hf import EmaCallback, EntropyGuidedRemovalCallback
from lambda_vit_hf.export.onnx import export_onnx
from lambda_vit_hf.models.checksums import remove_checksums
from lambda_vit_hf.models.finite import check_finite
from lambda_vit_hf.training.trainer_mixin import LambdaViTTrainer
from tests.small_training import make_trainer


@pytest.fixture
def too_large(model):
    """Finite weights, and logits that are not."""
    with torch.no_grad():
        model.vit.layers[1].mlp.fc1.weight.fill_(3e38)
    return model


def test_weights_and_answers_are_looked_at(model):
    model.train()
    check_finite(model, "it")
    assert model.training
    with torch.no_grad():
        model.classifier.bias[0] = torch.nan
    with pytest.raises(FloatingPointError, match=r"1 weights of it hold NaN or infinity: classifier\.bias"):
        check_finite(model, "it")


def test_weights_too_large_to_answer_are_noticed(too_large):
    with pytest.raises(FloatingPointError, match="it gives NaN or infinity for an image"):
        check_finite(too_large, "it")


def test_it_is_not_exported(too_large, tmp_path):
    with pytest.raises(ValueError, match="another function"):
        export_onnx(too_large.eval(), tmp_path / "model.onnx")
    assert not list(tmp_path.glob("*.onnx"))


def test_it_is_not_saved_as_the_model_of_a_training(model, tmp_path):
    trainer = make_trainer(model, tmp_path, [], kind=LambdaViTTrainer)
    with torch.no_grad():
        model.vit.layers[1].mlp.fc1.weight.fill_(torch.inf)
    with pytest.raises(FloatingPointError, match="the trained model"):
        trainer.save_model()
    assert not list(tmp_path.glob("*.safetensors"))


def test_an_average_with_nan_does_not_become_the_model(model, tmp_path):
    def make():
        callbacks = [EmaCallback(0.9), EntropyGuidedRemovalCallback(removed_layers=[1])]
        return make_trainer(model, tmp_path, callbacks, kind=LambdaViTTrainer, save_strategy="steps", save_steps=8)

    make().train()
    checkpoint = tmp_path / "checkpoint-8"
    remove_checksums(checkpoint)  # as if it had been written so
    average = load_file(checkpoint / "ema.safetensors")
    average["vit.layernorm.weight"][0] = torch.nan
    save_file(average, checkpoint / "ema.safetensors", metadata={"format": "pt", "global_step": "8"})
    model = type(model).from_pretrained(checkpoint)
    with pytest.raises(OSError, match=r"ema\.safetensors holds NaN or infinity in vit\.layernorm\.weight"):
        make().train(resume_from_checkpoint=str(checkpoint))
