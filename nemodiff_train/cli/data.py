"""``nemodiff data``: prepare a data set, or its text by a model, merge several, look at one or at a run's samples."""

import argparse
import os
from typing import TYPE_CHECKING

from nemodiff_train.cli import regenerate
from nemodiff_train.cli.input_options import add_input_arguments
from nemodiff_train.console import console
from nemodiff_train.errors import UserError
from nemodiff_train.model.checkpoint import Checkpoint
from nemodiff_train.runtime import init_runtime, init_without_device

if TYPE_CHECKING:
    from nemodiff_train.data.manifest import Manifest


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the sub-commands."""
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    _add_prepare(actions.add_parser("prepare", help="turn text into .bin/.idx; repeated, it continues"))
    regenerate.add_arguments(
        actions.add_parser("regenerate", help="write the answers of records again, in a model's own words")
    )
    _add_merge(actions.add_parser("merge", help="make one data set of several that were prepared alike"))
    inspect = actions.add_parser("inspect", help="show what a prepared data set holds")
    inspect.add_argument("prefix", metavar="PREFIX", help="path of the data set without .bin")
    inspect.add_argument("--verify", action="store_true", help="recompute the checksums")
    show = actions.add_parser("show", help="show the first training samples of a run, masks and losses marked")
    show.add_argument("recipe", help="a function in recipes/, or FILE.py[:function]")
    show.add_argument("settings", nargs="*", metavar="key=value", help="the recipe's arguments, and overrides")
    show.add_argument("--count", type=int, default=2, metavar="N", help="samples (default 2)")


def _add_prepare(parser: argparse.ArgumentParser) -> None:
    add_input_arguments(parser)
    parser.add_argument(
        "--tokenizer",
        required=True,
        metavar="DIR_OR_NAME",
        help="Hugging Face tokenizer, or a checkpoint",
    )
    parser.add_argument("--output", required=True, metavar="PREFIX", help="path of the result without .bin")
    parser.add_argument(
        "--eod-token", metavar="TOKEN", help="ends documents (default: the EOS token), or answers (the template's)"
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=len(os.sched_getaffinity(0)),
        metavar="N",
        help="tokenizing processes (default: one per core); the result does not depend on it",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing data set")


def _add_merge(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shards", metavar="SHARD", nargs="+", help="paths of the data sets without .bin, in order")
    parser.add_argument("--output", required=True, metavar="PREFIX", help="path of the result without .bin")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing data set")


def run(arguments: argparse.Namespace) -> int:
    """Run the sub-command; 130 after Ctrl-C."""
    if arguments.action == "show":
        _show(arguments)
        return 0
    if arguments.action == "regenerate":
        return regenerate.run(arguments)
    if arguments.action == "merge":
        init_without_device()
        from nemodiff_train.data.merge import merge

        _tell(arguments.output, merge(arguments.shards, arguments.output, arguments.overwrite))
        return 0
    if arguments.action == "inspect":
        from nemodiff_train.data.inspection import inspect

        inspect(arguments.prefix, arguments.verify)
        return 0
    return _prepare(arguments)


def _prepare(arguments: argparse.Namespace) -> int:
    init_without_device()
    from nemodiff_train.data.prepare import PrepareOptions, prepare

    fields = {name: getattr(arguments, name) for name in PrepareOptions.__dataclass_fields__}
    if checkpoint := Checkpoint.find(arguments.tokenizer):
        fields["tokenizer"] = str(checkpoint.tokenizer_directory)
    try:
        manifest = prepare(PrepareOptions(**fields))
    except KeyboardInterrupt:
        console.print("interrupted; the same command continues from there")
        return 130
    _tell(arguments.output, manifest)
    return 0


def _show(arguments: argparse.Namespace) -> None:
    if arguments.count < 1:
        raise UserError(f"--count {arguments.count}: use 1 or more")
    init_runtime()
    from nemodiff_train.config.recipes import load_recipe
    from nemodiff_train.training.samples import show_samples

    show_samples(load_recipe(arguments.recipe, arguments.settings), arguments.count)


def _tell(prefix: str, manifest: "Manifest") -> None:
    console.print(f"{prefix}: {manifest.documents:,} documents, {manifest.tokens:,} tokens", soft_wrap=True)
