"""What a checkpoint of DeiT-B size costs: writing it, and its checksums, which training does not wait for.

    python -m benchmarks.checkpoint_saving --folder /a/disk/to/measure

Prints seconds of three checkpoints: how long the training loop stood still, and how long the list took beside it.
"""

import argparse
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from transformers import TrainingArguments

from lambda_vit_hf import EntropyGuidedRemovalCallback, LambdaViTConfig, LambdaViTForImageClassification
from lambda_vit_hf.training.trainer_mixin import LambdaViTTrainer


class Images(torch.utils.data.Dataset):
    """Six images of one colour."""

    def __len__(self):
        return 6

    def __getitem__(self, index):
        return {"pixel_values": torch.full((3, 224, 224), 0.1 * index), "labels": index}


class TimedTrainer(LambdaViTTrainer):
    """Prints what saving takes; waits for the list, so that the next checkpoint does not."""

    def _maybe_log_save_evaluate(self, *args, **kwargs):
        wall, cpu = time.perf_counter(), time.process_time()
        super()._maybe_log_save_evaluate(*args, **kwargs)
        stood = time.perf_counter() - wall
        self._checksums().wait()
        listed = time.perf_counter() - wall - stood
        cpu = time.process_time() - cpu
        print(f"training stood still for {stood:.2f} s, the list came {listed:.2f} s later; {cpu:.2f} s of CPU in all")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", default=None, help="where to write, by default the folder of temporary files")
    with TemporaryDirectory(dir=parser.parse_args().folder) as folder:
        arguments = TrainingArguments(
            output_dir=folder, max_steps=3, per_device_train_batch_size=2, save_strategy="steps", save_steps=1,
            save_total_limit=1, report_to="none", use_cpu=True, dataloader_pin_memory=False, disable_tqdm=True,
            logging_strategy="no",
        )  # fmt: skip
        model = LambdaViTForImageClassification(LambdaViTConfig(num_labels=1000))
        TimedTrainer(
            model=model, args=arguments, train_dataset=Images(),
            callbacks=[EntropyGuidedRemovalCallback(removed_layers=[1])],
        ).train()  # fmt: skip
        sizes = {path.name: path.stat().st_size / 1e6 for path in Path(folder, "checkpoint-3").iterdir()}
    print(", ".join(f"{name} {size:.0f} MB" for name, size in sizes.items() if size > 1))


if __name__ == "__main__":
    main()
