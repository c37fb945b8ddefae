"""Everything that needs a GPU, in one command and under 10 minutes: inference, training, search.

    make benchmark-gpu                                  # on the GPU: figures and tables in outputs/gpu
    python -m benchmarks.gpu --dry_run                  # tiny shapes on a CPU: does it run at all?

Inference: DeiT-B's shape, transformers' ViT (sdpa) and timm's beside ours, 5 and 6 of 12 attention layers removed,
fp32, bf16 and fp16, batches of 1, 32 and 256, eager and (bf16) compiled, peak memory. Training: a step of the Trainer
with the callback, while lambda falls and at lambda = 0, beside one without. Search: seconds of NOSE for DeiT-B and
ViT-L. Images are noise. Each part is written when it is done: one that fails is named in the end, and costs no other.
"""

import json
import logging
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.search_speed import measure_search, search_table
from benchmarks.training_speed import measure_training, training_table
from lambda_vit_hf.evaluation.throughput import environment_line
from lambda_vit_hf.export.inference_speed import inference_table, measure_inference
from lambda_vit_hf.export.variants import BenchmarkSetup


logger = logging.getLogger(__name__)

EAGER = ["transformers", "timm", "timm+removed", "lambda+removed+folded", "lambda+removed+folded+prepared",
         "lambda+removed+folded+merged+prepared"]  # fmt: skip
COMPILED = [f"{name}+compiled" for name in ("transformers", "timm+removed", "lambda+removed+folded+prepared")]
REMOVED = {5: (0, 1, 3, 4, 6), 6: (0, 1, 3, 4, 6, 9)}  # DeiT-B's in the paper


@dataclass(frozen=True)
class Part:
    """One measurement: a title, what measures it, and what prints it."""

    title: str
    measure: Callable[[], dict]
    table: Callable[[dict], str]


def parts(device: str, dry_run: bool) -> Iterator[Part]:
    """All measurements, the quick ones first."""
    common = {"device": device, "size": "tiny" if dry_run else "base"}
    common |= {"image_size": 32, "merging_r": 1} if dry_run else {}
    batch_sizes, rounds, images = ((1, 2), 3, 8) if dry_run else ((1, 32, 256), 20, 512)
    with_memory = device != "cpu"  # there in processes of their own, for minutes
    for dtype, removed in (("bf16", 5), ("fp16", 5), ("fp32", 5), ("bf16", 6)):
        setup = BenchmarkSetup(dtype=dtype, removed_layers=REMOVED[removed], **common)
        yield Part(
            f"inference, {dtype}, {removed} of 12 removed",
            lambda setup=setup: measure_inference(EAGER, setup, batch_sizes, rounds, 45, with_memory),
            inference_table,
        )
    setup = BenchmarkSetup(dtype="fp32" if dry_run else "bf16", **common)
    for bf16 in (False, True):
        yield Part(
            f"training, {'bf16' if bf16 else 'fp32'}",
            lambda bf16=bf16: measure_training(setup, batch_sizes[1], steps=max(rounds, 4), bf16=bf16),
            training_table,
        )
    for name, changes in (("DeiT-B", {}), ("ViT-L", {} if dry_run else {"size": "large", "num_hidden_layers": 24})):
        shape = BenchmarkSetup(**{**common, **changes})
        yield Part(
            f"search, {name}, {images} images",
            lambda shape=shape: measure_search(shape, 2, images, batch_size=32, disable_tqdm=True),
            search_table,
        )
    names = COMPILED[:1] if dry_run else COMPILED
    yield Part(
        "inference, compiled",
        lambda: measure_inference(names, setup, batch_sizes[:2], rounds, max_seconds=150, with_memory=False),
        inference_table,
    )


def run(device: str, output_dir: Path, dry_run: bool = False) -> list[str]:
    """
    Measure all parts, write `gpu.json` and `gpu.md` after each, and return what failed: `"title: error"`.
    """
    output_dir.mkdir(parents=True, exist_ok=True)
    figures, sections, failed = {}, [], []
    for part in parts(device, dry_run):
        try:
            result = part.measure()
        except (RuntimeError, ValueError, OSError) as error:  # of one part: memory, a compiler that is missing
            failed.append(f"{part.title}: {error}")
            logger.warning("%s", failed[-1])
            continue
        figures[part.title] = result
        sections.append(f"## {part.title}\n\n{part.table(result)}\n\n{environment_line(result['environment'])}\n")
        print(sections[-1], flush=True)
        (output_dir / "gpu.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
        (output_dir / "gpu.md").write_text("\n".join(sections), encoding="utf-8")
    return failed


def main(argv: Sequence[str] | None = None) -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--dry_run", action="store_true", help="tiny shapes on a CPU")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/gpu"))
    arguments = parser.parse_args(argv)
    if not arguments.dry_run and not torch.cuda.is_available():
        parser.error("there is no GPU that PyTorch can use; --dry_run tries the program on a CPU")
    failed = run("cpu" if arguments.dry_run else "cuda", arguments.output_dir, arguments.dry_run)
    if failed:
        raise SystemExit("Not measured:\n" + "\n".join(failed))


if __name__ == "__main__":
    main()
