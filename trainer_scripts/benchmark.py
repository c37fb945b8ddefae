"""`lambda-vit benchmark`, from a checkout:

python trainer_scripts/benchmark.py --size base
"""

from lambda_vit_hf.cli.benchmark import main
from lambda_vit_hf.cli.runner import run_program


if __name__ == "__main__":
    run_program("benchmark", main)
