"""The ``nemodiff`` command: one module per verb, each imported only when it is called."""

import argparse
import errno
import importlib
import os
import select
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from nemodiff_train import __version__
from nemodiff_train.distributed import REPORT_DELAY, is_main_process
from nemodiff_train.errors import RunStopped, UserError, disk_is_full, nearest
from nemodiff_train.runtime import init_runtime
from nemodiff_train.signals import INTERRUPTED

# Each module has `add_arguments(parser)` and `run(arguments)`.  Importing Megatron takes seconds, so a module imports
# it inside `run`, when arguments have been refused that can be refused without it.
VERBS = {
    "train": ("nemodiff_train.cli.train", "train a recipe: AR only, or AR + diffusion jointly"),
    "plan": ("nemodiff_train.cli.plan", "memory and step time of every layout, estimated"),
    "launch": ("nemodiff_train.cli.launch", "submit a recipe to SLURM, or print the job"),
    "convert": ("nemodiff_train.cli.convert", "move checkpoints between Hugging Face and Megatron"),
    "eval": ("nemodiff_train.cli.eval", "score accuracy and tokens per forward in every mode"),
    "lm-eval": ("nemodiff_train.cli.lm_eval", "lm-evaluation-harness with --model nemodiff"),
    "likelihood": ("nemodiff_train.cli.likelihood", "AR perplexity and diffusion bound of a text"),
    "sampler": ("nemodiff_train.cli.sampler", "train a sampler that decides which positions block diffusion unmasks"),
    "generate": ("nemodiff_train.cli.generate", "continue one prompt"),
    "chat": ("nemodiff_train.cli.chat", "talk to a model, its tokens coloured by the forwards that made them"),
    "data": ("nemodiff_train.cli.data", "turn text into Megatron's .bin/.idx"),
    "demo": ("nemodiff_train.cli.demo", "the whole job on a small model, offline"),
    "env": ("nemodiff_train.cli.env", "what is installed here and what a run would use, for bug reports"),
}


def _refuse(error: UserError) -> int:
    """Print an error and return the exit code; other ranks wait, and print it if no launcher ends them meanwhile."""
    if not is_main_process():
        time.sleep(REPORT_DELAY)
    print(f"nemodiff: error: {error}", file=sys.stderr)
    return 2


_UNUSABLE = (errno.ENAMETOOLONG, errno.ENOTDIR, errno.EACCES, errno.EROFS, errno.ELOOP)
"""Errors that are about a path itself."""


def _reader_has_gone() -> bool:
    """Return whether standard output is a pipe that nobody reads any more, as after ``| head``."""
    pipe = select.poll()
    try:
        pipe.register(sys.stdout, 0)
    except (OSError, ValueError):  # replaced, or closed
        return False
    return any(event & select.POLLERR for _, event in pipe.poll(0))


def _refuse_path(error: OSError) -> int:
    """Say which path cannot be used, and why; raise the error again where the path is not the reason."""
    name = "" if isinstance(error.filename, int | None) else os.fsdecode(error.filename)
    if disk_is_full(error):
        where = f" ('{name}')" if name else ""
        return _refuse(UserError(f"the disk is full{where}; make room and repeat the command"))
    if error.errno not in _UNUSABLE or not name:
        raise error
    shown = name if len(name) <= 200 else f"{name[:100]}..."
    return _refuse(UserError(f"'{shown}' cannot be used: {str(error.strerror).lower()}"))


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see '{self.prog} --help')")


def build_parser(verb: str | None = None) -> argparse.ArgumentParser:
    """Return the parser; of the verbs' modules, only that of ``verb`` is imported."""
    parser = _Parser(prog="nemodiff", description="Turn an autoregressive language model into a tri-mode one.")
    parser.add_argument("--version", action="version", version=f"nemodiff {__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True, parser_class=_Parser)
    for name, (module, summary) in VERBS.items():
        description = f"{summary[0].upper()}{summary[1:]}."
        sub = verbs.add_parser(name, help=summary, description=description, conflict_handler="resolve")
        if name == verb:
            importlib.import_module(module).add_arguments(sub)
    return parser


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the arguments of a command line; ``command_line`` of the result holds them.

    Raises:
        UserError: Not a verb, not its arguments, or an argument that cannot be one.
    """
    command_line = list(arguments)
    _check_command_line(command_line)
    verb = next((argument for argument in command_line if not argument.startswith("-")), None)
    if verb is not None and verb not in VERBS:
        raise UserError(f"unknown verb '{verb}'; known: {', '.join(VERBS)}.{nearest(verb, VERBS)}")
    if verb == "lm-eval":  # argparse would take the harness' options for ours
        first = command_line.index(verb) + 1
        command_line.insert(first + 2 * (command_line[first : first + 1] == ["--extend"]), "--")
    parser = build_parser(verb)
    parsed, rest = parser.parse_known_args(command_line)
    if hasattr(parsed, "settings") and not any(argument.startswith("-") for argument in rest):
        parsed.settings += rest  # overrides after an option, which argparse does not put together
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    parsed.command_line = command_line
    return parsed


def _check_command_line(command_line: Sequence[str]) -> None:
    """Refuse arguments that no verb can mean: bytes that are not text, and options without a value."""
    for before, argument in zip(["", *command_line], command_line, strict=False):
        try:
            argument.encode()
        except UnicodeEncodeError:
            raise UserError(f"the argument {argument!a} is not valid UTF-8") from None
        if (not argument and before.startswith("--")) or (argument.startswith("--") and argument.endswith("=")):
            raise UserError(f"{argument.rstrip('=') or before} is empty; name what it is, or leave it out")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb.

    Returns:
        0 on success, 1 if a training had to stop, 2 on bad input (after one line on standard error), 130 after
        Ctrl-C, 141 where what reads the output has gone.
    """
    try:
        parsed = parse(sys.argv[1:] if argv is None else argv)
        if file := getattr(parsed, "extend", None):
            init_runtime()
            from nemodiff_train.config.recipes import run_file

            run_file(Path(file))
        return importlib.import_module(VERBS[parsed.verb][0]).run(parsed) or 0
    except UserError as error:
        return _refuse(error)
    except OSError as error:
        if isinstance(error, BrokenPipeError) and _reader_has_gone():
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python writes when it ends
            return 128 + signal.SIGPIPE
        return _refuse_path(error)
    except KeyboardInterrupt:
        if is_main_process():
            print("nemodiff: interrupted", file=sys.stderr)
        return INTERRUPTED
    except RunStopped as stop:
        if stop.alone or is_main_process():
            print(f"nemodiff: {stop}", file=sys.stderr)
        else:
            time.sleep(REPORT_DELAY)
        return 1
