"""`lambda-vit finish`, from a checkout:

python trainer_scripts/finish_checkpoint.py outputs/run/checkpoint-900
"""

from lambda_vit_hf.cli.finish import main
from lambda_vit_hf.cli.runner import run_program


if __name__ == "__main__":
    run_program("finish", main)
