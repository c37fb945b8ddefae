"""Train a ViT (or take one), remove attention layers by entropy, and save what is left.

    lambda-vit train digits
    lambda-vit train digits --num_removed_layers 3 --seed 1
    lambda-vit train my_recipe.yaml --model_name_or_path facebook/deit-base-patch16-224 --dataset_dir path/to/images \\
        --output_dir outputs/mine
    lambda-vit train digits --resume_from_checkpoint true
    accelerate launch -m lambda_vit_hf.cli.train deit_base_imagenet
    accelerate launch --config_file trainer_scripts/accelerate_configs/two_cpu_processes.yaml \\
        -m lambda_vit_hf.cli.train digits --use_cpu true

A recipe is one of those that are installed, by name, or a YAML file. It is read first; the command line wins.
`--help` lists every field.
"""

import logging
import os
import sys
from collections.abc import Sequence

from ..training.recipes import known_recipes
from .runner import run_program


USAGE = "lambda-vit train RECIPE [--FIELD VALUE ...]"


def main(argv: Sequence[str] | None = None) -> None:
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv:
        print(f"usage: {USAGE}\nrecipes: {', '.join(known_recipes())}", file=sys.stderr)
        raise SystemExit(2)

    from ..training.arguments import PROGRAM_ARGUMENTS, parse_arguments

    # What is selected and when, once: from the first process.
    logging.basicConfig(format="%(levelname)s: %(message)s")
    logging.getLogger("lambda_vit_hf").setLevel("INFO" if os.environ.get("RANK", "0") == "0" else "WARNING")
    arguments = parse_arguments(argv, PROGRAM_ARGUMENTS, prog="lambda-vit train", usage=USAGE, description=__doc__)
    # Imported late: --help and a mistyped option need not wait for datasets and pictures.
    from ..training.run import run_training

    run_training(*arguments)


if __name__ == "__main__":
    run_program("train", main)
