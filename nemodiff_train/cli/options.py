"""Options that several verbs share: the ranks, the layout of a model, and the settings of decoding."""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from nemodiff_train.decoding.generation import DecodingSettings
from nemodiff_train.distributed import world_size
from nemodiff_train.errors import UserError
from nemodiff_train.model.checkpoint import Checkpoint
from nemodiff_train.processes import check_processes, run_ranks
from nemodiff_train.sampler.description import check_sampler

_HELP: dict[str, str] = {
    "max_new_tokens": "exact limit on new tokens",
    "temperature": "0 is greedy; above, tokens are drawn",
    "top_k": "draw from the k most probable tokens; 0 for all",
    "top_p": "draw from the most probable tokens that reach this probability",
    "seed": "seed of the draws",
    "policy": "which positions block diffusion unmasks: threshold, leftmost, entropy, fixed or trained",
    "entropy_bound": "nats, for --policy entropy",
    "steps": "forwards per block, for --policy fixed",
    "tree_nodes": "positions that mode tree verifies at once",
    "tree_width": "candidates per position, for mode tree",
    "search_budget": "forwards the oracle may spend on a prompt",
}
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


def add_decoding_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options to a verb."""
    defaults = {f.name: f.default for f in fields(DecodingSettings)}
    for name, text in _HELP.items():
        default = defaults[name]
        parser.add_argument(
            "--" + name.replace("_", "-"), type=type(default), default=default, help=f"{text} (%(default)s)"
        )
    parser.add_argument(
        "--threshold",
        type=float,
        help=f"probability from which block diffusion unmasks a position ({defaults['threshold']}, or the sampler's)",
    )
    parser.add_argument("--sampler", metavar="DIR", help="trained for this model; for --policy trained")
    parser.add_argument("--block-size", type=int, help="positions of a block or draft (default: as trained)")
    parser.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end before this text; repeatable"
    )
    parser.add_argument("--drafter", metavar="CHECKPOINT", help="trained for this model; for modes linear, tree")
    add_model_parallel(parser)
    add_extend(parser)


def decoding_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the options as arguments of :func:`~nemodiff_train.decoding.loading.load_decoding_model`."""
    names = [*_HELP, "sampler", "block_size", "tensor_parallel", "pipeline_parallel"]
    drafter = Checkpoint.open(arguments.drafter).require_drafter() if arguments.drafter else None
    return {
        **{name: getattr(arguments, name) for name in names},
        **_given(arguments, "threshold"),
        "stop_strings": tuple(arguments.stop),
        "drafter": drafter,
    }


def check_options(arguments: argparse.Namespace) -> None:
    """Refuse values that no model could decode with, before anything slow.

    Raises:
        UserError: Names the value.
    """
    check_sampler(arguments.policy, arguments.sampler)
    options = {name: getattr(arguments, name) for name in _HELP} | _given(arguments, "threshold", "block_size")
    DecodingSettings(**options, stop_strings=tuple(arguments.stop))


def _given(arguments: argparse.Namespace, *names: str) -> dict[str, Any]:
    """Return those of some options that the command line has."""
    return {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
