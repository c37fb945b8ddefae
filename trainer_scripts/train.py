"""Train a ViT (or take one), remove attention layers by entropy, and save what is left.

    accelerate launch trainer_scripts/train.py trainer_scripts/recipes/digits.yaml
    accelerate launch trainer_scripts/train.py trainer_scripts/recipes/digits.yaml --num_layers 3 --seed 1
    accelerate launch trainer_scripts/train.py trainer_scripts/recipes/digits.yaml \
        --model_name_or_path facebook/deit-base-patch16-224 --dataset_dir path/to/images --output_dir outputs/mine
    accelerate launch trainer_scripts/train.py trainer_scripts/recipes/digits.yaml --resume_from_checkpoint true
    accelerate launch --config_file trainer_scripts/accelerate_configs/two_cpu_processes.yaml \
        trainer_scripts/train.py trainer_scripts/recipes/digits.yaml --use_cpu true

The recipe is read first; the command line wins. `--help` lists every field.
"""

import logging
import os
import sys

from lambda_vit_hf.training.arguments import PROGRAM_ARGUMENTS, parse_arguments


def main(argv: list[str] | None = None) -> None:
    # What is selected and when, once: from the first process.
    logging.basicConfig(format="%(levelname)s: %(message)s")
    logging.getLogger("lambda_vit_hf").setLevel("INFO" if os.environ.get("RANK", "0") == "0" else "WARNING")
    arguments = parse_arguments(sys.argv[1:] if argv is None else argv, PROGRAM_ARGUMENTS)
    # Imported late: --help and a mistyped option need not wait for datasets and pictures.
    from lambda_vit_hf.training.run import run_training

    run_training(*arguments)


if __name__ == "__main__":
    main()
