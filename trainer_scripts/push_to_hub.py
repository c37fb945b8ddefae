"""`lambda-vit push`, from a checkout:

python trainer_scripts/push_to_hub.py outputs/digits me/lambda-digits --dry_run
"""

from lambda_vit_hf.cli.push import main
from lambda_vit_hf.cli.runner import run_program


if __name__ == "__main__":
    run_program("push", main)
