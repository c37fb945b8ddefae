"""What dilution costs, and what removal saves, in training: steps of the Hugging Face Trainer, side by side.

python -m benchmarks.training_speed --size small --guard
"""

import copy
import statistics
import tempfile
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Sequence
from pathlib import Path

import torch
from torch.utils.data import Dataset
from transformers import PrinterCallback, Trainer, TrainingArguments

from lambda_vit_hf.cli.benchmark import add_setup_arguments, read_setup, write_result
from lambda_vit_hf.cli.runner import run_program
from lambda_vit_hf.evaluation.throughput import describe_environment, markdown_table
from lambda_vit_hf.export.reference_models import as_transformers_model
from lambda_vit_hf.export.variants import BenchmarkSetup
from lambda_vit_hf.training.callback import EntropyGuidedRemovalCallback
from lambda_vit_hf.training.guards import StopOnNonFiniteGradient

from .turns import StepTimer, Turns, run_in_turns


PLAIN = "Trainer, transformers' ViT"
LIMITS = {"diluting": 1.03, "lambda = 0": 0.90}


class NoiseImages(Dataset):
    """Images of noise that lie ready in memory: reading them takes no time that could count."""

    def __init__(self, image_size: int, num_labels: int, num_images: int):
        generator = torch.Generator().manual_seed(0)
        self.pixel_values = torch.randn(8, 3, image_size, image_size, generator=generator)
        self.num_labels, self.num_images = num_labels, num_images

    def __len__(self) -> int:
        return self.num_images

    def __getitem__(self, index: int) -> dict:
        return {"pixel_values": self.pixel_values[index % 8], "labels": index % self.num_labels}


def measure_training(
    setup: BenchmarkSetup, batch_size: int = 8, steps: int = 20, bf16: bool = False, with_guard: bool = False
) -> dict:
    """
    Time optimizer steps of real Trainers that run in turns, one step each (see [`StepTimer`]).

    One trains transformers' ViT; one trains the same weights with [`EntropyGuidedRemovalCallback`]: first while lambda
    falls, then at lambda = 0. Their steps are compared pair by pair.

    Args:
        setup ([`BenchmarkSetup`]): the shape, the layers to remove, the device.
        batch_size (`int`, *optional*, defaults to 8): images per step.
        steps (`int`, *optional*, defaults to 20): timed steps while diluting, and as many at lambda = 0.
        bf16 (`bool`, *optional*, defaults to `False`): mixed precision.
        with_guard (`bool`, *optional*, defaults to `False`): with [`StopOnNonFiniteGradient`] too.

    Returns:
        `dict`: `rows` with `phase`, `ratio` (median of ours / plain), its quartiles, median seconds of both, and the
        limit; `environment`; JSON-serialisable.
    """
    warm_up = 3
    max_steps = 2 * (steps + warm_up) + 1
    ours_name = "with the callback" + (" and the guard" if with_guard else "")
    base = setup.base_model
    models = {PLAIN: as_transformers_model(base), ours_name: copy.deepcopy(base)}
    removal = EntropyGuidedRemovalCallback(removed_layers=list(setup.removed_layers), hold_share=0.5)
    callbacks = {PLAIN: [], ours_name: [removal, *([StopOnNonFiniteGradient()] if with_guard else [])]}
    turns = Turns(models)
    timers, programs = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for index, (name, model) in enumerate(models.items()):
            args = _arguments(Path(folder) / str(index), batch_size, max_steps, setup.device, bf16)
            images = NoiseImages(model.config.image_size, model.config.num_labels, batch_size * max_steps)
            timers[name] = StepTimer(name, turns, args.device)
            trainer = Trainer(model, args, train_dataset=images, callbacks=[timers[name], *callbacks[name]])
            trainer.remove_callback(PrinterCallback)
            programs[name] = trainer.train
        run_in_turns(programs, turns)
    seconds = {name: timer.seconds for name, timer in timers.items()}
    lambdas = [removal.dilution.at(step) for step in range(max_steps - 1)]
    first_zero = lambdas.index(0.0)
    phases = {"diluting": range(warm_up, first_zero), "lambda = 0": range(first_zero + warm_up, max_steps - 1)}
    rows = [_compare(phase, chosen, seconds[PLAIN], seconds[ours_name]) for phase, chosen in phases.items()]
    environment = {**describe_environment(args.device), "precision": "bf16" if bf16 else "fp32", "batch": batch_size}
    return {"rows": rows, "size": setup.size, "removed": list(setup.removed_layers), "callbacks": ours_name,
            "seconds": seconds, "environment": environment}  # fmt: skip


def _arguments(folder: Path, batch_size: int, max_steps: int, device: str, bf16: bool) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=batch_size,
        max_steps=max_steps,
        bf16=bf16,
        use_cpu=device == "cpu",
        dataloader_pin_memory=device != "cpu",
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )


def _compare(phase: str, steps: range, plain: list[float], ours: list[float]) -> dict:
    ratios = [ours[step] / plain[step] for step in steps]
    lower, median, upper = statistics.quantiles(ratios, n=4)
    return {
        "phase": phase,
        "ratio": median,
        "quartiles": [lower, upper],
        "limit": LIMITS[phase],
        "steps": len(ratios),
        "plain_seconds": statistics.median(plain[step] for step in steps),
        "seconds": statistics.median(ours[step] for step in steps),
    }


def training_table(result: dict) -> str:
    """The rows of [`measure_training`] in Markdown."""
    header = ["phase", "plain step (ms)", f"step {result['callbacks']} (ms)", "ratio, median", "quartiles", "wanted"]
    rows = [
        [
            row["phase"],
            f"{1000 * row['plain_seconds']:.0f}",
            f"{1000 * row['seconds']:.0f}",
            f"{row['ratio']:.3f}",
            "{:.3f} to {:.3f}".format(*row["quartiles"]),
            f"at most {row['limit']:.2f}",
        ]
        for row in result["rows"]
    ]
    return markdown_table(header, rows)


def main(argv: Sequence[str] | None = None) -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    add_setup_arguments(parser, "small", ["fp32", "bf16"])
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--steps", type=int, default=20, help="timed while diluting, and as many at lambda = 0")
    parser.add_argument("--guard", action="store_true", help="with StopOnNonFiniteGradient beside the callback")
    arguments = parser.parse_args(argv)
    setup = read_setup(arguments)
    result = measure_training(setup, arguments.batch_size, arguments.steps, setup.dtype == "bf16", arguments.guard)
    write_result("training", result, training_table(result), arguments.output_dir)


if __name__ == "__main__":
    run_program("benchmark", main)
