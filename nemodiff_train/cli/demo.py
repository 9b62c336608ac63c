"""``nemodiff demo``: an AR checkpoint in, a tri-mode checkpoint out, scored in three modes; offline."""

import argparse
from pathlib import Path

from nemodiff_train.cli.ranks import at_least_1
from nemodiff_train.errors import UserError
from nemodiff_train.files import check_can_be_made
from nemodiff_train.runtime import init_runtime


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments."""
    parser.add_argument("--output", required=True, help="folder for everything the demo makes; new or empty")
    parser.add_argument("--start-from", metavar="DIR", help="your own Hugging Face AR model instead of a new one")
    parser.add_argument("--mask-token", metavar="TOKEN", help="a token of its tokenizer that never occurs in text")
    parser.add_argument("--count", type=at_least_1, help="problems to score (200; fewer of a large model on a CPU)")


def run(arguments: argparse.Namespace) -> None:
    """Run the whole job, one announced step after another."""
    output = Path(arguments.output)
    check_can_be_made(output)
    if output.exists() and any(output.iterdir()):
        raise UserError(f"'{output}' is not empty; name a new folder, or remove it")
    if arguments.mask_token and not arguments.start_from:
        raise UserError("--mask-token goes with --start-from; the demo's own model has a mask token")
    if arguments.start_from and not Path(arguments.start_from).is_dir():
        raise UserError(f"'{arguments.start_from}' is not a directory; give a Hugging Face model directory")
    init_runtime()
    from nemodiff_train.demo.run import run_demo

    run_demo(output, arguments.start_from, arguments.mask_token, arguments.count)
