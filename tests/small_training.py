"""A training that takes a second: for tests of callbacks and trainers."""

import torch
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

from lambda_vit_hf import EntropyGuidedRemovalCallback, LambdaViTConfig, LambdaViTForImageClassification
from tests.conftest import TINY


class Blobs(Dataset):
    """48 noisy images whose class is the brightness of a corner; a little random noise at each reading, if asked."""

    def __init__(self, noise: float = 0.0):
        generator = torch.Generator().manual_seed(0)
        self.labels = [index % 5 for index in range(48)]
        self.images = 0.5 * torch.randn(48, 3, 16, 16, generator=generator)
        self.images[:, :, :4, :4] += torch.tensor(self.labels).view(-1, 1, 1, 1).float()
        self.noise = noise

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        image = self.images[index]
        # Random numbers drawn while loading would differ after resuming: the dataloader reads one batch ahead.
        image = image + self.noise * torch.randn_like(image) if self.noise else image
        return {"pixel_values": image, "labels": self.labels[index]}


def make_trainer(model, folder, callbacks, dataset=None, kind: type[Trainer] = Trainer, **arguments) -> Trainer:
    defaults = dict(
        output_dir=str(folder), max_steps=12, per_device_train_batch_size=8, learning_rate=1e-3, weight_decay=0.1,
        save_strategy="no", logging_steps=1, report_to="none", disable_tqdm=True, dataloader_pin_memory=False,
        use_cpu=True,
    )  # fmt: skip
    return kind(
        model=model,
        args=TrainingArguments(**{**defaults, **arguments}),
        train_dataset=dataset or Blobs(),
        eval_dataset=Blobs(),
        callbacks=callbacks,
        compute_metrics=lambda p: {"accuracy": float((p.predictions.argmax(-1) == p.label_ids).mean())},
    )


class Recorder(TrainerCallback):
    """What each optimizer step ran with: lambda of every layer, and how many attentions were computed per forward."""

    def __init__(self):
        self.lambdas, self.attentions, self.weights = [], [], []

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.calls = 0
        for layer in model.encoder_layers:
            layer.attention.register_forward_hook(self.count)

    def count(self, *_):
        self.calls += 1

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        self.calls = 0

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.lambdas.append(model.attention_lambdas)
        self.attentions.append(self.calls)
        self.weights.append([p.detach().clone() for p in model.encoder_layers[2].attention_parameters()])


class StopAt(TrainerCallback):
    """Ends the training after a step."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.step


def final_weights(folder, resume=None, fade_to=None, **arguments):
    """A training with removal, with dropout and stochastic depth; returns model, callback and trainer."""
    torch.manual_seed(0)
    config = LambdaViTConfig(**TINY, hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1, drop_path_rate=0.1)
    model = LambdaViTForImageClassification(config)
    callback = EntropyGuidedRemovalCallback(num_removed_layers=3, fade_to=fade_to)
    settings = dict(save_strategy="steps", save_steps=1, eval_strategy="steps", eval_steps=2) | arguments
    trainer = make_trainer(model, folder, [callback], **settings)
    trainer.train(resume_from_checkpoint=resume)
    return model, callback, trainer
