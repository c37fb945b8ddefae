"""`lambda-vit evaluate`, from a checkout:

python trainer_scripts/evaluate_checkpoint.py MODEL --dataset_dir DIR
"""

from lambda_vit_hf.cli.evaluate import main
from lambda_vit_hf.cli.runner import run_program


if __name__ == "__main__":
    run_program("evaluate", main)
