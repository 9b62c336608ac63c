"""``nemodiff data regenerate CHECKPOINT INPUT ... --output OUT.jsonl``."""

import argparse
from pathlib import Path

from nemodiff_train.cli.decoding_options import (
    add_decoding_arguments,
    at_least_1,
    check_options,
    decoding_options,
)
from nemodiff_train.cli.input_options import add_input_arguments
from nemodiff_train.cli.ranks import add_nproc, start_ranks
from nemodiff_train.console import say
from nemodiff_train.errors import UserError
from nemodiff_train.files import check_can_be_made, locked
from nemodiff_train.model.checkpoint import Checkpoint
from nemodiff_train.resilience.signals import INTERRUPTED
from nemodiff_train.runtime import init_runtime


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments."""
    parser.add_argument("checkpoint", help="Megatron checkpoint of this project")
    add_input_arguments(parser)
    parser.add_argument("--prompt-tokens", type=at_least_1, metavar="N", help="tokens of a text that are the prompt")
    parser.add_argument("--output", required=True, metavar="OUT.jsonl", help="for 'nemodiff data prepare'")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output")
    parser.add_argument("--mode", help="how to decode (default: linear if the model or a drafter can draft, else ar)")
    parser.add_argument("--batch-size", type=at_least_1, default=32, help="answers written together (%(default)s)")
    add_nproc(parser)
    add_decoding_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Write the answers, or what an interrupted command has left of them.

    Returns:
        0, 130 after Ctrl-C, or the exit code of a rank that failed.
    """
    check_options(arguments)
    output = Path(arguments.output)
    if output.suffix != ".jsonl" or output.is_dir():
        raise UserError(f"--output {output}: name a file that ends in .jsonl, which 'nemodiff data prepare' reads")
    check_can_be_made(output.parent)
    checkpoint = Checkpoint.open(arguments.checkpoint).require_model()
    if arguments.nproc is not None:
        return start_ranks(arguments.words, arguments.nproc)
    init_runtime()
    from nemodiff_train.decoding.regeneration import RegenerateOptions, regenerate

    options = RegenerateOptions(**{name: getattr(arguments, name) for name in RegenerateOptions.__dataclass_fields__})
    try:
        with locked(output):
            regenerate(checkpoint, options, decoding_options(arguments))
    except KeyboardInterrupt:
        say("interrupted; the same command continues from there")
        return INTERRUPTED
    return 0
