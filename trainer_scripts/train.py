"""`lambda-vit train`, from a checkout:

accelerate launch trainer_scripts/train.py digits
"""

from lambda_vit_hf.cli.runner import run_program
from lambda_vit_hf.cli.train import main


if __name__ == "__main__":
    run_program("train", main)
