"""``nemodiff train RECIPE [key=value ...]``: one process, several with ``--nproc``, or the ranks of a launcher."""

import argparse
import math
import signal
from collections.abc import Sequence
from typing import NoReturn

from nemodiff_train.cli.ranks import add_nproc, start_ranks
from nemodiff_train.config.registry import recipe_files
from nemodiff_train.errors import UserError
from nemodiff_train.runtime import init_runtime
from nemodiff_train.signals import exit_on_signals, restore_signal_handlers

MOST_GPUS = 100_000
"""More GPUs than any run has had; the groups of a layout list every rank."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments."""
    parser.add_argument("recipe", help="a function in recipes/, or FILE.py[:function]")
    parser.add_argument("-h", "--help", action=_Help, help="show this; after a recipe, its arguments too")
    parser.add_argument("--list", action=_List, help="show the names of all recipes")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="the recipe's arguments, and overrides")
    add_nproc(parser)
    parser.add_argument("--dry-run", action="store_true", help="check everything, build nothing, print one page")
    parser.add_argument("--yaml", action="store_true", help="with --dry-run: print the whole configuration instead")
    parser.add_argument("--gpus", type=int, help="with --dry-run: GPUs of the run (default: the fewest)")
    parser.add_argument("--gpu-memory", type=float, default=80.0, help="with --dry-run: GB of one GPU (default 80)")


def run(arguments: argparse.Namespace) -> int:
    """Train, or check a run without starting it.

    Returns:
        0, or 2 if a dry run finds problems.
    """
    if not arguments.dry_run and (arguments.gpus is not None or arguments.yaml):
        raise UserError("--gpus and --yaml go with --dry-run; a run has the processes that torchrun starts")
    gpus = 1 if arguments.gpus is None else arguments.gpus
    if not 1 <= gpus <= MOST_GPUS or not 0 < arguments.gpu_memory < math.inf:
        raise UserError(f"--gpus takes a number from 1 to {MOST_GPUS:,}, --gpu-memory a number above 0")
    if arguments.nproc is not None:
        if arguments.dry_run:
            raise UserError("--nproc goes with a run; --dry-run takes the number of GPUs as --gpus")
        return start_ranks(arguments.command_line, arguments.nproc)
    if not arguments.dry_run:
        exit_on_signals(signal.SIGUSR1, signal.SIGINT)
    try:
        return _train(arguments)
    finally:
        if not arguments.dry_run:
            restore_signal_handlers()


def _train(arguments: argparse.Namespace) -> int:
    init_runtime()
    from nemodiff_train.config.recipes import load_recipe, recipe_defaults
    from nemodiff_train.training.run import check_run, resolved_yaml, train

    config = load_recipe(arguments.recipe, arguments.settings)
    if arguments.yaml:
        print(resolved_yaml(config), end="")
        return 0
    if arguments.dry_run:
        defaults = recipe_defaults(arguments.recipe, arguments.settings)
        return check_run(config, defaults, arguments.gpus, arguments.gpu_memory)
    train(config)
    return 0


class _Help(argparse.Action):
    """Show the help of the verb, and after a recipe its arguments with their defaults."""

    def __init__(self, option_strings: Sequence[str], dest: str, help: str | None = None) -> None:
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, help=help)

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, *rest: object) -> NoReturn:
        parser.print_help()
        if recipe := getattr(namespace, "recipe", None):
            init_runtime()
            from nemodiff_train.config.recipes import describe_recipe

            print(f"\n{describe_recipe(recipe)}")
        parser.exit()


class _List(_Help):
    """Show the names of all recipes."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, *rest: object) -> NoReturn:
        for file, (summary, names) in recipe_files().items():
            print(f"recipes/{file}.py: {summary}\n    {'\n    '.join(names)}")
        parser.exit()
