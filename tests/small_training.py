"""A training that takes a second: for tests of callbacks and trainers."""

import torch
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments


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
