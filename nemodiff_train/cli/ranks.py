"""Start the ranks of a verb on this machine."""

import argparse
import sys
from collections.abc import Sequence

from nemodiff_train.distributed import world_size
from nemodiff_train.errors import UserError
from nemodiff_train.processes import check_processes, run_ranks


def add_nproc(parser: argparse.ArgumentParser) -> None:
    """Add the option to a verb."""
    parser.add_argument("--nproc", type=int, help="start so many ranks on this machine, as torchrun does")


def start_ranks(words: Sequence[str], count: int) -> int:
    """Run a command line as several ranks, without its option ``--nproc``.

    Args:
        words: Verb and arguments.
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
    _, others = option.parse_known_args(words)
    code = run_ranks([sys.executable, "-m", "nemodiff_train", *others], count)
    return code if code >= 0 else 128 - code
