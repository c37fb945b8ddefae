"""`lambda-vit convert`, from a checkout:

python trainer_scripts/convert_checkpoint.py base_01346.pth --output_dir DIR
"""

from lambda_vit_hf.cli.convert import main
from lambda_vit_hf.cli.runner import run_program


if __name__ == "__main__":
    run_program("convert", main)
