"""`lambda-vit export`, from a checkout:

python trainer_scripts/export.py MODEL --output_dir DIR
"""

from lambda_vit_hf.cli.export import main
from lambda_vit_hf.cli.runner import run_program


if __name__ == "__main__":
    run_program("export", main)
