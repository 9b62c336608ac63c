"""``nemodiff lm-eval ...``: lm-evaluation-harness with ``--model nemodiff``."""

import argparse
import importlib.util
import sys
from pathlib import Path

from nemodiff_train.errors import UserError, line_in


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...", help="arguments of lm_eval")


def run(arguments: argparse.Namespace) -> None:
    """Make the model known to the harness, and hand it the arguments."""
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError("lm-evaluation-harness is not installed; install the extra: nemodiff-train[lm-eval]")
    from nemodiff_train.runtime import init_runtime

    init_runtime()
    import lm_eval
    from lm_eval.__main__ import cli_evaluate

    import nemodiff_train.evaluation.lm_eval  # noqa: F401  (registers the model)

    words = [word for word in arguments.arguments if word != "--"]
    chosen = [] if "--model" in words or not any(word.startswith("-") for word in words) else ["--model", "nemodiff"]
    sys.argv = ["lm_eval", *words, *chosen]
    try:
        cli_evaluate()
    except ValueError as error:
        if line_in(error, Path(lm_eval.__file__).parent) is None:
            raise
        raise UserError(f"lm-eval: {error}") from None  # what the harness says of its own arguments
