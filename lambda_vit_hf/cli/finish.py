"""Finish a checkpoint of a training: remove and fold the layers that have faded out, and save the small model.

    lambda-vit finish outputs/digits/checkpoint-1125
    lambda-vit finish outputs/digits/checkpoint-1125 --output_dir outputs/digits-finished

A checkpoint of a run is of full size until the run ends. From any one whose chosen layers are at lambda = 0 this makes
what the run itself would have left: `save_pretrained`'s folder, which every program here takes.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from .runner import program_parser, run_program


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = program_parser("finish", __doc__)
    parser.add_argument("checkpoint", type=Path, help="checkpoint-N folder of a run")
    parser.add_argument("--output_dir", type=Path, help="by default `finished` beside the checkpoint")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse_arguments(argv)
    from ..training.finishing import finish_checkpoint

    output_dir = arguments.output_dir or arguments.checkpoint.resolve().parent / "finished"
    finish_checkpoint(arguments.checkpoint, output_dir)
    print(f"Written to {output_dir}.")


if __name__ == "__main__":
    run_program("finish", main)
