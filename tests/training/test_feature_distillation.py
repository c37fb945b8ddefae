"""Removal without labels: the loss on features, and the Trainer around it."""

import copy

import pytest
import torch
from torch.utils.data import Dataset
from transformers import AutoModel, TrainingArguments

from lambda_vit_hf import (
    AutoLambdaModel,
    EntropyGuidedRemovalCallback,
    FeatureDistillationTrainer,
    LambdaDinov2Backbone,
    LambdaDinov2Config,
    LambdaDinov2Model,
    LambdaViTConfig,
    LambdaViTModel,
)
from lambda_vit_hf.training.feature_distillation import FeatureDistillationLoss
from tests.conftest import perturb
from tests.models.test_families import BARE, SHAPE, trained_looking


class Pictures(Dataset):
    """Noise without labels."""

    def __init__(self, count=24):
        self.images = torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(0))

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return {"pixel_values": self.images[index]}


@pytest.fixture
def encoder():
    torch.manual_seed(0)
    return perturb(LambdaDinov2Model(LambdaDinov2Config(**SHAPE)))


def make(model, folder, callbacks=(), images=None, **arguments):
    defaults = dict(
        output_dir=str(folder), max_steps=10, per_device_train_batch_size=8, learning_rate=1e-3, save_strategy="no",
        logging_steps=1, report_to="none", disable_tqdm=True, dataloader_pin_memory=False, use_cpu=True,
        train_sampling_strategy="sequential",
    )  # fmt: skip
    images = images or Pictures()
    return FeatureDistillationTrainer(
        model=model, args=TrainingArguments(**{**defaults, **arguments}), train_dataset=images, eval_dataset=images,
        callbacks=list(callbacks),
    )  # fmt: skip


@pytest.mark.parametrize("name", BARE)
def test_the_features_are_what_users_of_the_encoder_take_from_it(name, pixel_values, tmp_path):
    torch.manual_seed(0)
    theirs = trained_looking(BARE[name]())
    theirs.save_pretrained(tmp_path)
    model = AutoLambdaModel.from_pretrained(tmp_path)
    with torch.no_grad():
        outputs = model(pixel_values)
        image, patches = model.image_and_patch_features(outputs.last_hidden_state)
        if name.startswith(("dino", "siglip_vision_model", "clip")) and outputs.get("pooler_output") is not None:
            torch.testing.assert_close(image, outputs.pooler_output)
        assert image.shape == (3, 32) and patches.shape == (3, 16, 32)
        if name != "clip_vision_model":  # whose last_hidden_state is before the last LayerNorm
            assert torch.equal(patches, outputs.last_hidden_state[:, -16:])
        model.remove_attention([0, 2])
        removed = model.image_and_patch_features(model(pixel_values).last_hidden_state)
        model.fold_removed_attention()
        folded = model.image_and_patch_features(model(pixel_values).last_hidden_state)
    assert all(torch.equal(one, other) for one, other in zip(folded, removed, strict=True))


def test_the_loss_is_the_cosine_distance_of_image_and_patches(encoder, pixel_values):
    loss = FeatureDistillationLoss(encoder)
    student = perturb(copy.deepcopy(encoder), seed=1)
    assert loss(encoder, encoder(pixel_values), pixel_values).item() == pytest.approx(0, abs=1e-6)
    found = loss(student, student(pixel_values), pixel_values)
    ours, theirs = student(pixel_values).last_hidden_state, encoder(pixel_values).last_hidden_state
    ours, theirs = (one / one.norm(dim=-1, keepdim=True) for one in (ours, theirs))
    cosines = (ours * theirs).sum(dim=-1)
    torch.testing.assert_close(found, 1 - (cosines[:, 0].mean() + cosines[:, 1:].mean()) / 2)
    found.backward()
    assert all(parameter.grad is None for parameter in loss.teacher.parameters())
    assert student.encoder.layer[0].mlp.fc1.weight.grad.abs().max() > 0


def test_the_teacher_stays_what_the_model_was(encoder, pixel_values):
    loss = FeatureDistillationLoss(encoder.train())
    before = encoder.eval()(pixel_values).last_hidden_state
    perturb(encoder, seed=1)
    assert not loss.teacher.training
    assert torch.equal(loss.teacher(pixel_values).last_hidden_state, before)


def test_an_encoder_is_thinned_on_images_without_labels(encoder, tmp_path):
    whole, images = copy.deepcopy(encoder), Pictures().images
    removal = EntropyGuidedRemovalCallback(num_removed_layers=2, hold_share=0.8)
    trainer = make(encoder, tmp_path, [removal], max_steps=40)
    trainer.train()
    assert removal.selection.output == "class_token" and len(removal.selection.layers) == 2
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[0] == pytest.approx(0, abs=1e-5) and losses[-1] < 0.6 * max(losses)
    metrics = trainer.evaluate()
    trainer.save_model()
    smaller = AutoModel.from_pretrained(tmp_path)
    assert smaller.config.removed_layers == removal.selection.layers and smaller.config.fold_removed
    loss = FeatureDistillationLoss(whole)
    with torch.no_grad():
        image, patches = loss.cosines(smaller, smaller(images), images).mean(dim=0).tolist()
    assert metrics["eval_image_cosine"] == pytest.approx(image, abs=1e-5)
    assert metrics["eval_patch_cosine"] == pytest.approx(patches, abs=1e-5)
    assert metrics["eval_loss"] == pytest.approx(1 - (image + patches) / 2, abs=1e-5)


@pytest.mark.parametrize("labelled", [False, True])
def test_accumulated_gradients_are_those_of_one_batch(encoder, tmp_path, labelled):
    class WithLabels(Pictures):
        def __getitem__(self, index):
            return {**super().__getitem__(index), **({"labels": 0} if labelled else {})}

    weights = []
    for accumulation in (1, 4):
        student = copy.deepcopy(encoder)
        trainer = make(
            student, tmp_path, images=WithLabels(8), max_steps=1, learning_rate=0.1, max_grad_norm=0, optim="sgd",
            per_device_train_batch_size=8 // accumulation, gradient_accumulation_steps=accumulation,
        )  # fmt: skip
        trainer.distillation = FeatureDistillationLoss(perturb(copy.deepcopy(encoder), seed=1))
        trainer.train()
        weights.append(student.encoder.layer[0].mlp.fc1.weight.detach())
    torch.testing.assert_close(weights[0], weights[1])
    assert not torch.equal(weights[0], encoder.encoder.layer[0].mlp.fc1.weight)


def test_unreadable_images_count_in_no_evaluation(encoder, tmp_path):
    class OneBlack(Pictures):
        def __getitem__(self, index):
            black = {"pixel_values": torch.full((3, 16, 16), 9.0), "labels": -100}
            return black if index == 0 else {**super().__getitem__(index), "labels": 0}

    student = perturb(copy.deepcopy(encoder), seed=1)
    trainer = make(student, tmp_path, images=OneBlack(9), per_device_eval_batch_size=16)
    trainer.distillation = FeatureDistillationLoss(encoder)
    with_black = trainer.evaluate()
    without = trainer.evaluate(torch.utils.data.Subset(trainer.eval_dataset, range(1, 9)))
    for name in ("eval_image_cosine", "eval_patch_cosine", "eval_loss"):
        assert with_black[name] == pytest.approx(without[name], rel=1e-5)
    with pytest.raises(ValueError, match="no features to compare"):
        trainer.evaluate(torch.utils.data.Subset(trainer.eval_dataset, [0]))


def test_what_gives_no_features_is_refused(encoder, model):
    for wrong, said in (
        (model, r"LambdaViTForImageClassification: pass `model\.base_model`"),
        (LambdaDinov2Backbone(LambdaDinov2Config(**SHAPE)), "load it with AutoLambdaModel"),
        (BARE["dinov2"](), "Expected a model such as LambdaViT"),
    ):
        with pytest.raises(ValueError, match=said):
            FeatureDistillationLoss(wrong)
    loss, images = FeatureDistillationLoss(encoder), torch.zeros(1, 3, 16, 16)
    narrow = LambdaDinov2Model(LambdaDinov2Config(**{**SHAPE, "hidden_size": 16}))
    with pytest.raises(ValueError, match="same patches and width"):
        loss(narrow, narrow(images), images)


@pytest.mark.parametrize("name", [name for name in BARE if not name.startswith("dinov3")])
def test_encoders_that_merge_are_compared_patch_by_patch_or_refused(name, pixel_values, tmp_path):
    trained_looking(BARE[name]()).save_pretrained(tmp_path)
    encoder = AutoLambdaModel.from_pretrained(tmp_path, token_merging_r=2)
    loss = FeatureDistillationLoss(encoder)
    if name in ("vit", "deit"):  # what leaves them is in no order, and need not stand for the same patches
        with pytest.raises(ValueError, match=r"no feature of each patch.*set_token_merging\(0\)"):
            loss(encoder, encoder(pixel_values), pixel_values)
    else:
        whole = AutoLambdaModel.from_pretrained(tmp_path)
        exact = FeatureDistillationLoss(whole)(encoder, encoder(pixel_values), pixel_values)
        assert loss(encoder, encoder(pixel_values), pixel_values) == exact > 1e-6, "the teacher merges nothing"
        assert loss(whole, whole(pixel_values), pixel_values) < 1e-6


def test_what_could_not_be_compared_is_refused_before_any_training(tmp_path):
    encoder = LambdaViTModel(LambdaViTConfig(**SHAPE, token_merging_r=2))
    with pytest.raises(ValueError, match="say --token_merging_r 0"):
        make(encoder, tmp_path)
