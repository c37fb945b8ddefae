"""`lambda-vit finish`: from a checkpoint at lambda = 0 to the model that training would have left."""

import pytest
import torch

from lambda_vit_hf import EntropyGuidedRemovalCallback, LambdaViTForImageClassification
from lambda_vit_hf.cli import finish
from tests.small_training import make_trainer


@pytest.fixture
def trained(model, tmp_path):
    """A Trainer after training; checkpoints 4 (diluting), 8 and 12 (lambda = 0) are in `run`."""
    callback = EntropyGuidedRemovalCallback(removed_layers=[1, 3], hold_share=0.5)
    trainer = make_trainer(model, tmp_path / "run", [callback], save_strategy="steps", save_steps=4)
    trainer.train()
    return trainer


def test_the_finished_model_is_the_one_that_training_leaves(trained, tmp_path, capsys, pixel_values):
    finish.main([str(tmp_path / "run" / "checkpoint-12")])
    assert f"Written to {tmp_path / 'run' / 'finished'}" in capsys.readouterr().out
    finished = LambdaViTForImageClassification.from_pretrained(tmp_path / "run" / "finished")
    assert finished.config.removed_layers == [1, 3] and finished.config.fold_removed
    with torch.no_grad():
        torch.testing.assert_close(finished(pixel_values).logits, trained.model.eval()(pixel_values).logits)


def test_another_folder_can_be_named(trained, tmp_path):
    finish.main([str(tmp_path / "run" / "checkpoint-8"), "--output_dir", str(tmp_path / "small")])
    assert (tmp_path / "small" / "model.safetensors").is_file()
    with pytest.raises(ValueError, match="not at lambda = 0"):
        finish.main([str(tmp_path / "run" / "checkpoint-4"), "--output_dir", str(tmp_path / "early")])
