"""`lambda-vit select`, from a checkout:

python trainer_scripts/select_layers.py MODEL --dataset_dir DIR --removal_ratio 0.4
"""

from lambda_vit_hf.cli.runner import run_program
from lambda_vit_hf.cli.select import main


if __name__ == "__main__":
    run_program("select", main)
