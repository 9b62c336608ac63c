"""``nemodiff train RECIPE [key=value ...]``, alone or under torchrun."""

import argparse

from nemodiff_train.errors import UserError
from nemodiff_train.runtime import init_runtime


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments."""
    parser.add_argument("recipe", help="a function in recipes/, or FILE.py[:function]")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="the recipe's arguments, and overrides")
    parser.add_argument("--dry-run", action="store_true", help="check everything, build nothing, print one page")
    parser.add_argument("--gpus", type=int, help="with --dry-run: GPUs of the run; by default the fewest it takes")
    parser.add_argument("--gpu-memory", type=float, default=80.0, help="with --dry-run: GB of one GPU (default 80)")


def run(arguments: argparse.Namespace) -> int:
    """Train, or check a run without starting it.

    Returns:
        0, or 2 if a dry run finds problems.
    """
    if not arguments.dry_run and arguments.gpus is not None:
        raise UserError("--gpus goes with --dry-run; a run has the processes that torchrun starts")
    if (arguments.gpus is not None and arguments.gpus < 1) or not arguments.gpu_memory > 0:
        raise UserError("--gpus and --gpu-memory take a number above 0")
    init_runtime()
    from nemodiff_train.config.recipes import load_recipe
    from nemodiff_train.training.run import check_run, train

    config = load_recipe(arguments.recipe, arguments.settings)
    if arguments.dry_run:
        return check_run(config, arguments.gpus, arguments.gpu_memory)
    train(config)
    return 0
