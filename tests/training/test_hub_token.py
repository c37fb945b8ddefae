"""The Hub's token: used, and never written."""

import copy
import pickle

import pytest
import torch
from transformers import Trainer

from lambda_vit_hf import EntropyGuidedRemovalCallback
from lambda_vit_hf.training.hub_token import UnwrittenToken
from lambda_vit_hf.training.trainer_mixin import LambdaViTTrainer
from tests.small_training import make_trainer


SECRET = "hf_" + "kept" * 8


@pytest.mark.parametrize(("kind", "removal"), [(Trainer, True), (LambdaViTTrainer, False)])
def test_the_token_is_in_no_file_of_any_trainer(model, tmp_path, kind, removal):
    callbacks = [EntropyGuidedRemovalCallback(removed_layers=[1])] if removal else []
    trainer = make_trainer(
        model, tmp_path, callbacks, kind=kind, hub_token=SECRET, save_strategy="steps", save_steps=6
    )
    if not removal:
        trainer.train()
    else:
        trainer.args.hub_token = SECRET  # given late
        trainer.train()
    trainer.save_model()
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert tmp_path / "training_args.bin" in written and tmp_path / "checkpoint-6" / "training_args.bin" in written
    assert [path for path in written if SECRET.encode() in path.read_bytes()] == []
    assert torch.load(tmp_path / "training_args.bin", weights_only=False).hub_token is None
    assert trainer.args.hub_token == SECRET and f"Bearer {trainer.args.hub_token}" == f"Bearer {SECRET}"


def test_a_copy_in_the_same_process_keeps_it():
    arguments = {"hub_token": UnwrittenToken(SECRET)}
    assert copy.deepcopy(arguments) == copy.copy(arguments) == {"hub_token": SECRET}
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        assert pickle.loads(pickle.dumps(arguments, protocol)) == {"hub_token": None}
