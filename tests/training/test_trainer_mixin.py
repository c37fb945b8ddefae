"""What a Trainer with the mixin does beyond transformers' own; the Hub's side is in test_golden.py."""

import hashlib

import pytest
import torch
from transformers import Trainer

from lambda_vit_hf import (
    EntropyGuidedRemovalCallback,
    LambdaViTForImageClassification,
    LambdaViTTrainer,
    LambdaViTTrainerMixin,
)
from tests.conftest import in_two_processes
from tests.small_training import make_trainer


def weights_in_one_number(model) -> str:
    values = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    return hashlib.sha256(values.numpy().tobytes()).hexdigest()


def remove_twice(vit: str, folder: str, rank: int) -> list:
    """Two removals with one Trainer in several processes, with an evaluation in between."""
    model = LambdaViTForImageClassification.from_pretrained(vit)
    first, second = (EntropyGuidedRemovalCallback(num_removed_layers=2) for _ in range(2))
    trainer = make_trainer(model, folder, [first], kind=LambdaViTTrainer, per_device_train_batch_size=4)
    trainer.train()
    trainer.evaluate()
    trainer.remove_callback(first)
    trainer.add_callback(second)
    trainer.train()
    return [model.config.removed_layers, weights_in_one_number(model)]


def test_removal_after_removal_works_in_two_processes(vit_folder, tmp_path):
    one, other = in_two_processes(remove_twice, str(vit_folder), str(tmp_path))
    assert len(one[0]) == 4
    assert one == other


class OwnTrainer(LambdaViTTrainerMixin, Trainer):
    """A Trainer of a user's."""


@pytest.mark.parametrize("kind", [LambdaViTTrainer, OwnTrainer])
def test_the_card_is_ours_where_layers_were_removed(model, tmp_path, kind):
    trainer = make_trainer(model, tmp_path, [EntropyGuidedRemovalCallback(removed_layers=[1])], kind=kind)
    trainer.train()
    trainer.create_model_card(model_name="mine", license="mit")
    card = (tmp_path / "README.md").read_text()
    assert "attention of layers [1]" in card and "license: mit" in card and "had access to" not in card


def test_without_removal_the_card_is_the_trainers(model, tmp_path):
    trainer = make_trainer(model, tmp_path, [], kind=LambdaViTTrainer)
    trainer.train()
    trainer.create_model_card()
    assert "had access to" in (tmp_path / "README.md").read_text()
