import copy

import pytest
import torch
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

from lambda_vit_hf.training.losses import (
    ClassificationLoss,
    DistillationLoss,
    distance_of_hidden_states,
    images_averaged_over,
)
from lambda_vit_hf.training.trainer import ImageClassificationTrainer
from tests.conftest import checkpoint_activations, perturb


@pytest.fixture
def logits() -> torch.Tensor:
    return (3 * torch.randn(8, 5, generator=torch.Generator().manual_seed(0))).requires_grad_()


@pytest.fixture
def soft_labels() -> torch.Tensor:
    return torch.rand(8, 5, generator=torch.Generator().manual_seed(1)).softmax(dim=-1)


HARD = torch.tensor([0, 1, 2, 3, 4, 0, 1, 2])


def test_soft_labels_give_timms_loss(logits, soft_labels):
    loss = ClassificationLoss()({"logits": logits}, soft_labels)
    torch.testing.assert_close(loss, SoftTargetCrossEntropy()(logits, soft_labels))


def test_hard_labels_give_timms_smoothed_loss_in_training_and_plain_cross_entropy_in_evaluation(logits):
    loss = ClassificationLoss(label_smoothing=0.1)
    torch.testing.assert_close(loss({"logits": logits}, HARD), LabelSmoothingCrossEntropy(0.1)(logits, HARD))
    plain = torch.nn.functional.cross_entropy(logits, HARD).detach()
    torch.testing.assert_close(loss({"logits": logits.detach()}, HARD), plain)


def test_images_without_label_are_left_out(logits):
    labels = HARD.clone()
    labels[2:] = -100
    for smoothing, reference in ((0.0, torch.nn.CrossEntropyLoss()), (0.1, LabelSmoothingCrossEntropy(0.1))):
        torch.testing.assert_close(
            ClassificationLoss(smoothing)({"logits": logits}, labels), reference(logits[:2], HARD[:2])
        )
    assert ClassificationLoss()({"logits": logits}, torch.full((8,), -100)) == 0.0


def test_the_number_of_images_is_counted_as_the_trainer_counts_elements(logits, soft_labels):
    # Two batches of one optimizer step: 8 and 2 images of 5 classes.
    assert images_averaged_over(soft_labels, torch.tensor(50)) == 10
    assert images_averaged_over(HARD, 10) == 10
    assert images_averaged_over(HARD) == 8
    total = SoftTargetCrossEntropy()(logits, soft_labels) * 8
    torch.testing.assert_close(ClassificationLoss()({"logits": logits}, soft_labels, torch.tensor(50)), total / 10)


def test_half_precision_logits_lose_no_digits_in_the_loss(logits, soft_labels):
    half = logits.detach().bfloat16()
    loss = ClassificationLoss()({"logits": half}, soft_labels)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, SoftTargetCrossEntropy()(half.float(), soft_labels))


def test_labels_that_do_not_fit_are_refused(logits):
    with pytest.raises(ValueError, match="needs `labels`"):
        ClassificationLoss()({"logits": logits}, None)
    with pytest.raises(ValueError, match=r"\(8, 4\) do not fit"):
        ClassificationLoss()({"logits": logits}, torch.ones(8, 4))
    with pytest.raises(ValueError, match=r"in \[0, 1\)"):
        ClassificationLoss(1.0)


class Images(Dataset):
    def __init__(self, soft: bool):
        generator = torch.Generator().manual_seed(3)
        self.images = torch.randn(12, 3, 16, 16, generator=generator)
        self.labels = torch.rand(12, 5, generator=generator).softmax(-1) if soft else torch.arange(12) % 5

    def __len__(self):
        return 12

    def __getitem__(self, index):
        return {"pixel_values": self.images[index], "labels": self.labels[index]}


class DistillingTrainer(Trainer):
    """As the example of `DistillationLoss` says."""

    distillation = None

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        images = images_averaged_over(inputs["labels"], num_items_in_batch)
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            images = images / self.accelerator.num_processes
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if self.distillation is not None:
            loss = self.distillation(inputs["pixel_values"], outputs.logits, loss, images)
        return (loss, outputs) if return_outputs else loss


def gradient_of_one_step(model, folder, soft, distill, batch, accumulate, average=True) -> torch.Tensor:
    """The whole dataset in one optimizer step, at learning rate 0; the gradient is caught before it is cleared."""
    model = copy.deepcopy(model)
    trainer = DistillingTrainer(
        model=model,
        args=TrainingArguments(
            str(folder), max_steps=1, per_device_train_batch_size=batch, gradient_accumulation_steps=accumulate,
            learning_rate=0.0, max_grad_norm=0.0, report_to="none", disable_tqdm=True, use_cpu=True,
            save_strategy="no", dataloader_pin_memory=False, average_tokens_across_devices=average,
        ),
        train_dataset=Images(soft),
        compute_loss_func=ClassificationLoss(label_smoothing=0.1),
    )  # fmt: skip
    if distill:
        trainer.distillation = DistillationLoss(perturb(copy.deepcopy(model), seed=9), kind=distill)
    caught = []
    model.classifier.weight.register_post_accumulate_grad_hook(lambda parameter: caught.append(parameter.grad.clone()))
    trainer.train()
    return caught[-1]


@pytest.mark.parametrize("average", [True, False])
@pytest.mark.parametrize(("soft", "distill"), [(True, None), (False, None), (True, "soft"), (False, "hard")])
def test_accumulated_gradients_are_those_of_one_large_batch(model, tmp_path, soft, distill, average):
    whole = gradient_of_one_step(model, tmp_path, soft, distill, 12, 1, average)
    assert whole.abs().max() > 1e-3
    # 5, 5 and 2 images: the last batch is smaller.
    accumulated = gradient_of_one_step(model, tmp_path, soft, distill, 5, 3, average)
    torch.testing.assert_close(accumulated, whole, rtol=1e-5, atol=1e-7)


def test_the_trainer_evaluates_hard_labels_by_plain_cross_entropy(model, tmp_path):
    trainer = DistillingTrainer(
        model=model,
        args=TrainingArguments(str(tmp_path), report_to="none", disable_tqdm=True, use_cpu=True),
        eval_dataset=Images(soft=False),
        compute_loss_func=ClassificationLoss(label_smoothing=0.1),
    )
    trainer.distillation = DistillationLoss(perturb(copy.deepcopy(model), seed=9))
    expected = torch.nn.functional.cross_entropy(model(Images(False).images).logits, Images(False).labels)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected.item(), rel=1e-5)


def test_soft_distillation_is_timms(model, pixel_values):
    from timm.task.distillation import LogitDistillationTask

    student, teacher = perturb(copy.deepcopy(model), seed=4), model

    class Logits(torch.nn.Module):
        def __init__(self, classifier):
            super().__init__()
            self.classifier = classifier

        def forward(self, images, return_features=False):
            return self.classifier(images).logits

        def normalize_input(self, images, mean, std):
            return images

    task = LogitDistillationTask.__new__(LogitDistillationTask)
    torch.nn.Module.__init__(task)
    task.trainable_module, task.teacher = Logits(student), Logits(teacher)
    task.criterion, task.temperature, task.student_mean, task.student_std = SoftTargetCrossEntropy(), 3.0, None, None
    task.task_loss_weight, task.distill_loss_weight = 0.25, 0.75
    targets = torch.eye(5)[:3]
    theirs = task(pixel_values, targets)["loss"]
    logits = student(pixel_values).logits
    base = ClassificationLoss()({"logits": logits}, targets)
    ours = DistillationLoss(teacher, alpha=0.75, temperature=3.0)(pixel_values, logits, base)
    torch.testing.assert_close(ours, theirs)


def test_hard_distillation_takes_the_teachers_class_as_label(model, pixel_values):
    student = perturb(copy.deepcopy(model), seed=4)
    logits = student(pixel_values).logits
    loss = DistillationLoss(model, alpha=0.3, kind="hard")(pixel_values, logits, torch.tensor(2.0))
    told = torch.nn.functional.cross_entropy(logits, model(pixel_values).logits.argmax(-1))
    torch.testing.assert_close(loss, 0.7 * 2.0 + 0.3 * told)


def test_the_teacher_is_a_copy_that_is_never_trained(model, pixel_values):
    model.train()
    distillation = DistillationLoss(model)
    assert not distillation.teacher.training and model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    with torch.no_grad():
        model.classifier.weight.zero_()
    logits = model(pixel_values).logits
    distillation(pixel_values, logits, logits.sum() * 0).backward()
    assert model.classifier.weight.grad.abs().max() > 0
    assert all(one.grad is None and not one.requires_grad for one in distillation.teacher.parameters())


def test_in_evaluation_only_the_base_loss_is_returned_and_the_teacher_rests(model, pixel_values):
    distillation = DistillationLoss(model)
    distillation.teacher.register_forward_hook(lambda *_: pytest.fail("the teacher ran"))
    base = torch.tensor(1.25)
    with torch.no_grad():
        assert distillation(pixel_values, model(pixel_values).logits, base) is base


def test_a_checkpoint_holds_no_teacher(model, tmp_path):
    trainer = DistillingTrainer(
        model=model, args=TrainingArguments(str(tmp_path), report_to="none"), compute_loss_func=ClassificationLoss()
    )
    trainer.distillation = DistillationLoss(model)
    assert not [name for name in trainer.model.state_dict() if "teacher" in name]


def test_impossible_distillation_is_refused(model, pixel_values):
    for settings, message in (
        (dict(alpha=1.5), "alpha"),
        (dict(temperature=0.0), "temperature"),
        (dict(kind="warm"), "kind"),
    ):
        with pytest.raises(ValueError, match=message):
            DistillationLoss(model, **settings)
    with pytest.raises(ValueError, match="same classes"):
        DistillationLoss(model)(pixel_values, torch.zeros(3, 4, requires_grad=True), torch.tensor(0.0))


@pytest.mark.parametrize("kind", ["soft", "hard"])
def test_the_teacher_computes_all_tokens(model, pixel_values, kind):
    whole = model.eval()(pixel_values).logits
    model.set_token_merging(4)
    assert not torch.equal(model(pixel_values).logits, whole)
    distillation = DistillationLoss(model, alpha=1.0, kind=kind)
    assert torch.equal(distillation.teacher(pixel_values).logits, whole)
    assert any(model.config.token_merging_schedule()), "the student still merges"


@pytest.mark.parametrize("hidden_weight", [0.0, 3.0])
def test_hidden_states_are_compared_block_by_block_whatever_their_size(model, pixel_values, hidden_weight):
    student = perturb(copy.deepcopy(model), seed=1).train()
    student.set_attention_lambda(0.5, [1])
    outputs, base = student(pixel_values, output_hidden_states=True), torch.tensor(1.0)
    distillation = DistillationLoss(model, alpha=0.25, hidden_weight=hidden_weight)
    loss = distillation(pixel_values, outputs.logits, base, hidden_states=outputs.hidden_states)
    with torch.no_grad():
        theirs = model.eval()(pixel_values, output_hidden_states=True)
    cosines = [
        torch.nn.functional.cosine_similarity(one, other, dim=-1).mean()
        for one, other in zip(outputs.hidden_states[1:], theirs.hidden_states[1:], strict=True)
    ]
    assert len(cosines) == model.config.num_hidden_layers
    plain = DistillationLoss(model, alpha=0.25)(pixel_values, outputs.logits, base)
    torch.testing.assert_close(loss, plain + 0.25 * hidden_weight * (1 - sum(cosines) / len(cosines)))
    twice = tuple(2 * states for states in outputs.hidden_states)
    torch.testing.assert_close(distillation(pixel_values, outputs.logits, base, hidden_states=twice), loss)


def test_hidden_states_that_cannot_be_compared_are_refused(model, pixel_values):
    distillation = DistillationLoss(model, hidden_weight=1.0)
    outputs = model.train()(pixel_values, output_hidden_states=True)
    for hidden_states in (None, outputs.hidden_states[:-1], [states[:, 1:] for states in outputs.hidden_states]):
        with pytest.raises(ValueError, match="cannot be compared"):
            distillation(pixel_values, outputs.logits, torch.tensor(1.0), hidden_states=hidden_states)
    with pytest.raises(ValueError, match="must be 0 or more"):
        DistillationLoss(model, hidden_weight=-1.0)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_trainer_teaches_what_leaves_the_blocks(model, tmp_path, checkpointing):
    teacher = copy.deepcopy(model)
    trainer = ImageClassificationTrainer(
        model=model,
        args=TrainingArguments(str(tmp_path), max_steps=1, per_device_train_batch_size=12, learning_rate=0.0,
                               max_grad_norm=0.0, report_to="none", disable_tqdm=True, use_cpu=True,
                               save_strategy="no"),
        train_dataset=Images(soft=False), eval_dataset=Images(soft=False),
    )  # fmt: skip
    if checkpointing:
        checkpoint_activations(model, use_reentrant=False)
    model.set_attention_lambda(0.0, [2])
    trainer.distillation = DistillationLoss(teacher, alpha=1.0, hidden_weight=1e6)  # so that nothing else counts
    gradients = []
    trainer.add_callback(CatchGradient(gradients))
    trainer.train()
    images = torch.stack([item["pixel_values"] for item in Images(soft=False)])
    model.zero_grad()
    mine, theirs = (one.eval()(images, output_hidden_states=True).hidden_states for one in (model, teacher))
    distance_of_hidden_states(mine, theirs).div(12).mul(1e6).backward()
    expected = model.vit.layers[2].mlp.fc1.weight.grad
    torch.testing.assert_close(gradients[0], expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())
    assert trainer.predict(Images(soft=False)).predictions.shape == (12, 5), "logits alone"


class CatchGradient(TrainerCallback):
    def __init__(self, gradients):
        self.gradients = gradients

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.gradients.append(model.vit.layers[2].mlp.fc1.weight.grad.clone())
