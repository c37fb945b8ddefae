"""The Trainer of the DeiT recipe: what it does otherwise than transformers' own."""

import copy

import pytest
import torch
from torch.utils.data import Dataset
from transformers import TrainingArguments

from lambda_vit_hf import EntropyGuidedRemovalCallback, LambdaViTConfig, LambdaViTForImageClassification
from lambda_vit_hf.data.dataset import collate
from lambda_vit_hf.data.mixing import MixupCollator
from lambda_vit_hf.training.arguments import LambdaTrainingArguments
from lambda_vit_hf.training.losses import DistillationLoss
from lambda_vit_hf.training.optimization import timm_cosine
from lambda_vit_hf.training.trainer import ImageClassificationTrainer
from tests.conftest import TINY
from tests.small_training import Blobs


def make(model, folder, dataset=None, options=(), **arguments) -> ImageClassificationTrainer:
    defaults = dict(
        output_dir=str(folder), num_train_epochs=2, per_device_train_batch_size=8, learning_rate=1e-3,
        save_strategy="no", logging_steps=1, report_to="none", disable_tqdm=True, use_cpu=True,
    )  # fmt: skip
    return ImageClassificationTrainer(
        model=model,
        args=LambdaTrainingArguments(**{**defaults, **arguments}),
        train_dataset=dataset or Blobs(),
        eval_dataset=Blobs(),
        data_collator=collate,
        **dict(options),
    )


def test_the_learning_rate_is_timms_cosine_with_a_floor(model, tmp_path):
    trainer = make(model, tmp_path, min_learning_rate=1e-5, warmup_epochs=0.5, warmup_learning_rate=1e-6)
    trainer.train()
    rates = [entry["learning_rate"] for entry in trainer.state.log_history if "loss" in entry]
    assert rates == pytest.approx([timm_cosine(step, 12, 3, 1e-3, 1e-5, 1e-6) * 1e-3 for step in range(12)], rel=1e-6)


def test_the_learning_rate_can_change_once_an_epoch(model, tmp_path):
    trainer = make(
        model, tmp_path, min_learning_rate=1e-5, warmup_epochs=1, learning_rate_granularity="epoch", num_train_epochs=3
    )
    trainer.train()
    rates = [entry["learning_rate"] for entry in trainer.state.log_history if "loss" in entry]
    assert [len(set(rates[epoch * 6 : epoch * 6 + 6])) for epoch in range(3)] == [1, 1, 1]
    assert len(set(rates)) == 3


def test_without_a_floor_the_schedule_is_the_trainers_own(model, tmp_path):
    trainer = make(model, tmp_path, lr_scheduler_type="constant")
    trainer.train()
    assert {entry["learning_rate"] for entry in trainer.state.log_history if "loss" in entry} == {1e-3}


def test_tokens_and_positions_are_not_decayed(model, tmp_path):
    trainer = make(model, tmp_path, weight_decay=0.1)
    trainer.create_optimizer()
    embeddings = model.vit.embeddings
    decays = {id(one): group["weight_decay"] for group in trainer.optimizer.param_groups for one in group["params"]}
    assert decays[id(embeddings.cls_token)] == decays[id(embeddings.position_embeddings)] == 0.0
    assert decays[id(model.classifier.bias)] == decays[id(model.vit.layernorm.weight)] == 0.0
    assert decays[id(model.classifier.weight)] == 0.1


def test_images_are_mixed_in_training_and_not_in_evaluation(model, tmp_path):
    trainer = make(model, tmp_path, options=dict(train_collator=MixupCollator(5)))
    assert next(iter(trainer.get_train_dataloader()))["labels"].shape == (8, 5)
    assert next(iter(trainer.get_eval_dataloader()))["labels"].shape == (8,)
    assert trainer.train().global_step == 12
    assert trainer.evaluate()["eval_loss"] > 0


class Seen(Dataset):
    """Notes which numbers were asked for, in which epoch."""

    def __init__(self):
        self.images, self.epoch, self.numbers = Blobs(), 0, {}

    def __len__(self):
        return 48

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __getitem__(self, number):
        self.numbers.setdefault(self.epoch, []).append(number)
        return self.images[number % 48]


def test_each_image_is_repeated_within_an_epoch_and_other_ones_in_the_next(model, tmp_path):
    images = Seen()
    make(model, tmp_path, images, options=dict(repeated_augmentation=3)).train()
    assert sorted(images.numbers) == [0, 1]
    for numbers in images.numbers.values():
        assert len(numbers) == len(set(numbers)) == 48
        assert len({number % 48 for number in numbers}) == 16
    assert images.numbers[0] != images.numbers[1]


def test_distillation_pulls_towards_the_teacher_and_leaves_it_alone(model, tmp_path):
    teacher = copy.deepcopy(model)
    pixel_values = torch.stack([item["pixel_values"] for item in (Blobs()[index] for index in range(8))])

    def distance(student):
        with torch.no_grad():
            student, wanted = (one.eval()(pixel_values).logits.log_softmax(-1) for one in (student, teacher))
        return torch.nn.functional.kl_div(student, wanted, log_target=True, reduction="batchmean").item()

    with torch.no_grad():
        model.classifier.weight.normal_(std=0.5, generator=torch.Generator().manual_seed(0))
    before = distance(model)
    trainer = make(model, tmp_path, num_train_epochs=5)
    trainer.distillation = DistillationLoss(teacher, alpha=1.0)
    trainer.train()
    assert distance(model) < 0.5 * before
    for mine, theirs in zip(trainer.distillation.teacher.parameters(), teacher.parameters(), strict=True):
        assert torch.equal(mine, theirs) and mine.grad is None


@pytest.mark.parametrize("bf16", [False, True])
def test_the_teacher_computes_as_the_student_does(model, tmp_path, bf16):
    trainer, seen = make(model, tmp_path, max_steps=1, bf16=bf16, use_cpu=True), {}
    trainer.distillation = DistillationLoss(model)
    for name, one in {"student": model, "teacher": trainer.distillation.teacher}.items():
        one.encoder_layers[0].mlp.register_forward_hook(lambda *hook, name=name: seen.update({name: hook[2].dtype}))
    trainer.train()
    assert seen == dict.fromkeys(("student", "teacher"), torch.bfloat16 if bf16 else torch.float32)
    assert {one.dtype for one in trainer.distillation.teacher.parameters()} == {torch.float32}


def test_the_length_of_training_is_known_beforehand(model, tmp_path):
    assert make(model, tmp_path, gradient_accumulation_steps=4).count_steps() == (2, 4)
    assert make(model, tmp_path, max_steps=7).count_steps() == (6, 7)


def test_resuming_from_the_last_step_in_mid_epoch_trains_no_more(model, tmp_path):
    make(model, tmp_path, max_steps=10, save_strategy="steps", save_steps=10).train()
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    resumed = make(model, tmp_path, max_steps=10, lr_scheduler_type="constant")
    assert resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-10")).global_step == 10
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def test_an_accumulated_step_moves_the_weights_as_one_large_batch(vit_folder, tmp_path):
    models = []
    for batch, accumulation in ((16, 1), (4, 4)):
        model = LambdaViTForImageClassification.from_pretrained(vit_folder)
        options = dict(per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation, max_steps=2)
        make(model, tmp_path, options={}, optim="sgd", seed=3, label_smoothing_factor=0.1, **options).train()
        models.append(model)
    for one, other in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "task",
    [
        {"problem_type": "multi_label_classification"},
        {"problem_type": "regression", "num_labels": 1},
        {"num_labels": 1},
    ],
    ids=str,
)
def test_a_model_for_another_task_is_refused_when_the_trainer_is_built(tmp_path, task):
    model = LambdaViTForImageClassification(LambdaViTConfig(**{**TINY, **task}))
    with pytest.raises(ValueError, match=r"one of several classes.*LambdaViTTrainer"):
        make(model, tmp_path)


def test_plain_training_arguments_train_with_the_trainers_own_schedule(model, tmp_path):
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=2, report_to="none", use_cpu=True, disable_tqdm=True, save_strategy="no"
    )
    trainer = ImageClassificationTrainer(
        model=model, args=arguments, train_dataset=Blobs(), data_collator=collate,
        callbacks=[EntropyGuidedRemovalCallback(removed_layers=[1])],
    )  # fmt: skip
    assert trainer.train().global_step == 2
    assert model.config.removed_layers == [1]
