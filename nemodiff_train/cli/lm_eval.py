"""``nemodiff lm-eval ...``: lm-evaluation-harness with ``--model nemodiff``."""

import argparse
import importlib.util
import sys
from pathlib import Path

from nemodiff_train.cli.ranks import add_extend
from nemodiff_train.errors import UserError, line_in
from nemodiff_train.runtime import init_runtime


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments; the harness parses all but ``--extend``, which comes first."""
    add_extend(parser)
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...", help="arguments of lm_eval")


def run(arguments: argparse.Namespace) -> None:
    """Let the harness parse its arguments, make the model known to it, and start it."""
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError("lm-evaluation-harness is not installed; install the extra: nemodiff-train[lm-eval]")
    import lm_eval  # an optional package, light without its evaluator
    from lm_eval._cli import HarnessCLI
    from lm_eval.utils import setup_logging

    setup_logging()
    options = [option for option in arguments.arguments if option != "--"]
    names_no_model = "--model" not in options and any(option.startswith("-") for option in options)
    sys.argv = ["lm_eval", *options, *(["--model", "nemodiff"] if names_no_model else [])]
    harness = HarnessCLI()
    parsed = harness.parse_args()
    init_runtime()
    import nemodiff_train.evaluation.lm_eval  # noqa: F401  (registers the model)

    try:
        harness.execute(parsed)
    except (ValueError, AssertionError) as error:
        if line_in(error, Path(lm_eval.__file__).parent) is None:
            raise
        raise UserError(f"lm-eval: {error}") from None  # the harness refuses arguments this way
