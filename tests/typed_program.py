"""A user's program, for the type checker only (`make quality`): what an editor knows of the public names."""

from typing import assert_type

import torch

import lambda_vit_hf
from lambda_vit_hf import (
    AttentionRemoval,
    AttentionSelection,
    DilutionConfig,
    EmaCallback,
    EntropyGuidedRemovalCallback,
    LambdaViTBackbone,
    LambdaViTConfig,
    LambdaViTForImageClassification,
    LambdaViTForMaskedImageModeling,
    LambdaViTModel,
    LambdaViTTrainer,
    LambdaViTTrainerMixin,
    SaveOnSigterm,
    SelectionConfig,
    StopOnNonFiniteGradient,
    find_resumable_checkpoint,
    finish_checkpoint,
    select_attention_layers,
    summarize,
)


def program(images: torch.Tensor) -> list[object]:
    assert_type(lambda_vit_hf.__version__, str)
    config = LambdaViTConfig(attention_flags=[True, False])
    assert_type(config.removed_layers, list[int])
    model = LambdaViTForImageClassification(config)
    selection = select_attention_layers(model, images, 1)
    assert_type(selection, AttentionSelection)
    assert_type(selection.layers, list[int])
    assert_type(summarize(model), str)
    assert_type(AttentionSelection.load("selection.json"), AttentionSelection)
    find_resumable_checkpoint("outputs/run")
    finish_checkpoint("outputs/run/checkpoint-9", "outputs/finished")
    configs = {"selection": SelectionConfig(mask="identity"), "dilution": DilutionConfig(hold_share=0.5)}
    other_models = [LambdaViTBackbone(config), LambdaViTForMaskedImageModeling(config), LambdaViTModel(config)]
    return [
        EntropyGuidedRemovalCallback(removal_ratio=0.4, calibration_dataset=images),
        AttentionRemoval(removal_ratio=0.4),
        LambdaViTTrainer(model),
        LambdaViTTrainerMixin,
        configs,
        EmaCallback(0.99),
        SaveOnSigterm(),
        StopOnNonFiniteGradient(),
        *other_models,
    ]
