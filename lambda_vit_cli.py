"""The command `lambda-vit`: finds the program that its first word names. `lambda-vit --help` imports nothing heavy.

A module of its own, because importing `lambda_vit_hf` registers its models with transformers: seconds before any help.
"""

import argparse
import importlib
import sys
from collections.abc import Sequence
from importlib.metadata import version


COMMANDS = {
    "train": "train by a recipe, remove attention layers by entropy, save what is left",
    "select": "which attention layers can a model do without? No training",
    "finish": "remove and fold the faded layers of a checkpoint",
    "evaluate": "top-1, top-5 and throughput on a dataset",
    "convert": "a timm, DeiT or Lambda-ViT file to a Hugging Face folder",
    "export": "ONNX (float32 or int8) or torch.export",
    "push": "push a finished model's folder to the Hub",
    "benchmark": "speed, memory and size of inference on this machine",
}


def build_parser() -> argparse.ArgumentParser:
    commands = "\n".join(f"  {name:<10} {purpose}" for name, purpose in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="lambda-vit",
        usage="lambda-vit COMMAND [options]",
        description="Vision transformers with fewer attention layers.",
        epilog=f"commands:\n{commands}\n\n`lambda-vit COMMAND --help` explains one. After an error,"
        " LAMBDA_VIT_DEBUG=1 in the environment shows where it arose.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="store_true", help="print the version of lambda-vit-hf")
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help=argparse.SUPPRESS)
    parser.add_argument("options", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    parser = build_parser()
    if not argv:
        parser.print_help(sys.stderr)
        raise SystemExit(2)
    if argv[0] == "--version":
        print(f"lambda-vit-hf {version('lambda-vit-hf')}")
        return
    arguments = parser.parse_args(argv)
    program = importlib.import_module(f"lambda_vit_hf.cli.{arguments.command}")
    runner = importlib.import_module("lambda_vit_hf.cli.runner")
    runner.run_program(arguments.command, program.main, arguments.options)


if __name__ == "__main__":
    main()
