"""Push a finished model's folder to the Hub: checked first, one commit, safe to repeat after a failure.

    lambda-vit push outputs/digits me/lambda-vit-digits --dry_run
    lambda-vit push outputs/digits me/lambda-vit-digits --private
    lambda-vit push outputs/digits me/lambda-vit-digits --revision six-layers-removed
    lambda-vit push outputs/digits someone/model --create_pr --commit_message "Fewer layers"

The token is that of `hf auth login`, or `HF_TOKEN` in the environment.
"""

import argparse
import shlex
import sys
from collections.abc import Sequence

from .runner import program_parser, run_program


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = program_parser("push", __doc__)
    parser.add_argument("folder", help="what save_pretrained, `lambda-vit train` or `lambda-vit export` wrote")
    parser.add_argument("repo_id", help="user/name; created if it does not exist")
    parser.add_argument("--private", action="store_true", default=None, help="if the repository is created now")
    parser.add_argument("--revision", help="branch to commit to, created if it does not exist")
    parser.add_argument("--create_pr", action="store_true", help="open a pull request instead")
    parser.add_argument("--dry_run", action="store_true", help="check the folder and list what would be sent")
    parser.add_argument("--commit_message", default="Upload LambdaViT")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    arguments = parse_arguments(argv)
    # Imported late: a mistyped option answers at once.
    from ..hub.push import PushError, push_folder

    try:
        result = push_folder(**vars(arguments))
    except PushError as error:
        raise PushError(f"{error}\nor: {shlex.join(['lambda-vit', 'push', *argv])}") from error
    for name, size in result.files.items():
        print(f"{name:<40}{size:>15,} bytes")
    print(result.pull_request_url or result.commit_url or "Dry run: nothing was sent.")


if __name__ == "__main__":
    run_program("push", main)
