"""Options whose import takes no time: counts, ranks, extensions, and the layout of a model."""

import argparse
import sys
from collections.abc import Sequence

from nemodiff_train.distributed import world_size
from nemodiff_train.errors import UserError
from nemodiff_train.processes import check_processes, run_ranks

_LARGEST = 10**9


def at_least_1(text: str) -> int:
    """Return a whole number from 1 to a billion; a type for argparse."""
    number = int(text) if text.isdecimal() else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number above 0")
    if number > _LARGEST:
        raise argparse.ArgumentTypeError(f"{text} is more than {_LARGEST:,}")
    return number


def add_nproc(parser: argparse.ArgumentParser) -> None:
    """Add the option that starts ranks."""
    parser.add_argument("--nproc", type=int, help="number of ranks to start on this machine, as torchrun does")


def start_ranks(command_line: Sequence[str], count: int) -> int:
    """Run a command line as several ranks, without its option ``--nproc``.

    Args:
        command_line: Verb and its arguments.
        count: Number of ranks.

    Returns:
        The exit code of the first rank that failed, else 0; that of a shell for a rank that a signal ended.

    Raises:
        UserError: They are too many for this machine, or a launcher has started ranks already.
    """
    check_processes("--nproc", count)
    if world_size() > 1:
        raise UserError("--nproc starts the ranks itself; leave it out under torchrun or srun")
    option = argparse.ArgumentParser(add_help=False)
    add_nproc(option)
    _, others = option.parse_known_args(command_line)
    code = run_ranks([sys.executable, "-m", "nemodiff_train", *others], count)
    return code if code >= 0 else 128 - code


def add_extend(parser: argparse.ArgumentParser) -> None:
    """Add the option that :func:`nemodiff_train.cli.main` reads."""
    parser.add_argument(
        "--extend", metavar="FILE.py", help="a recipe's file that adds modes, tasks or model families"
    )


def add_model_parallel(parser: argparse.ArgumentParser) -> None:
    """Add the options that say how many processes share one model."""
    for name, shared in (("tensor", "each layer"), ("pipeline", "the layers out")):
        parser.add_argument(
            f"--{name}-parallel", type=at_least_1, default=1, help=f"processes that share {shared} (%(default)s)"
        )


def check_world(arguments: argparse.Namespace) -> None:
    """Refuse another number of processes than one copy of the model takes.

    Raises:
        UserError: Names both numbers.
    """
    world, ranks = world_size(), arguments.tensor_parallel * arguments.pipeline_parallel
    if world != ranks:
        raise UserError(
            f"{world} processes were started, but --tensor-parallel {arguments.tensor_parallel} x "
            f"--pipeline-parallel {arguments.pipeline_parallel} takes {ranks}; start that many with torchrun"
        )
