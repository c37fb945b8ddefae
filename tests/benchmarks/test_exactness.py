"""The program that compares a checkpoint's Lambda model with transformers' own."""

import pytest
import torch

from benchmarks import exactness
from lambda_vit_hf import LambdaViTModel


def test_a_vit_passes_and_every_set_is_listed(vit_folder, capsys):
    exactness.main([str(vit_folder), "--sets", "2"])
    shown = capsys.readouterr().out
    assert "equal to ViTModel to the bit: True" in shown and shown.count("'torch.bfloat16': True") == 2


def test_a_model_that_computes_something_else_is_found(vit_folder, capsys, monkeypatch):
    remove = LambdaViTModel.remove_attention

    def careless(self, layers):
        remove(self, layers)
        with torch.no_grad():
            self.layers[-1].mlp.fc2.bias.add_(1e-3)

    monkeypatch.setattr(LambdaViTModel, "remove_attention", careless)
    with pytest.raises(SystemExit):
        exactness.main([str(vit_folder), "--sets", "1"])
    assert "'torch.float32': False" in capsys.readouterr().out
