"""``nemodiff data``: prepare a data set, or its text by a model, merge several, look at one or at a run's samples."""

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from nemodiff_train.cli.options import add_decoding_arguments, check_options, decoding_options
from nemodiff_train.cli.ranks import add_nproc, at_least_1, start_ranks
from nemodiff_train.console import console, say
from nemodiff_train.errors import UserError
from nemodiff_train.files import check_can_be_made, locked
from nemodiff_train.model.checkpoint import Checkpoint
from nemodiff_train.runtime import init_runtime, init_without_device
from nemodiff_train.signals import INTERRUPTED

if TYPE_CHECKING:
    from nemodiff_train.data.manifest import Manifest


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the sub-commands."""
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    _add_prepare(actions.add_parser("prepare", help="turn text into .bin/.idx; repeated, it continues"))
    _add_regenerate(actions.add_parser("regenerate", help="write the answers of records again with a model"))
    merge = actions.add_parser("merge", help="make one data set of several that were prepared alike")
    merge.add_argument("shards", metavar="SHARD", nargs="+", help="paths of the data sets without .bin, in order")
    merge.add_argument("--output", required=True, metavar="PREFIX", help="path of the result without .bin")
    merge.add_argument("--overwrite", action="store_true", help="replace an existing data set")
    inspect = actions.add_parser("inspect", help="show what a prepared data set holds")
    inspect.add_argument("prefix", metavar="PREFIX", help="path of the data set without .bin")
    inspect.add_argument("--verify", action="store_true", help="recompute the checksums")
    show = actions.add_parser("show", help="show the first training samples of a run, masks and losses marked")
    show.add_argument("recipe", help="a function in recipes/, or FILE.py[:function]")
    show.add_argument("settings", nargs="*", metavar="key=value", help="the recipe's arguments, and overrides")
    show.add_argument("--count", type=at_least_1, default=2, metavar="N", help="samples (default 2)")


def _add_inputs(parser: argparse.ArgumentParser) -> None:
    """Add the fields of :class:`~nemodiff_train.data.inputs.InputOptions` to an action."""
    parser.add_argument(
        "inputs",
        metavar="INPUT",
        nargs="+",
        help="text file (one document), .jsonl, .json, .parquet, a directory of these, or a Hugging Face data set "
        "(owner/name or owner/name:config)",
    )
    parser.add_argument("--text-field", metavar="NAME", help="field with the text (default text)")
    parser.add_argument("--chat", action="store_true", help="records are conversations, for fine-tuning")
    parser.add_argument("--messages-field", metavar="NAME", help="with --chat (default messages)")
    parser.add_argument("--prompt-field", metavar="NAME", help="field with a single prompt")
    parser.add_argument("--answer-field", metavar="NAME", help="with --prompt-field: the field with its answer")
    parser.add_argument("--split", help="split of a Hugging Face data set (default train)")
    parser.add_argument("--glob", metavar="PATTERN", help="files to take from directories (default all)")


def _add_prepare(parser: argparse.ArgumentParser) -> None:
    _add_inputs(parser)
    parser.add_argument(
        "--tokenizer", required=True, metavar="DIR_OR_NAME", help="Hugging Face tokenizer, or a checkpoint"
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


def _add_regenerate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", help="Megatron checkpoint of this project")
    _add_inputs(parser)
    parser.add_argument(
        "--prompt-tokens", type=at_least_1, metavar="N", help="use the first N tokens of each text as the prompt"
    )
    parser.add_argument("--output", required=True, metavar="OUT.jsonl", help="for 'nemodiff data prepare'")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output")
    parser.add_argument("--mode", help="how to decode (default: linear if the model or a drafter can draft, else ar)")
    parser.add_argument("--batch-size", type=at_least_1, default=32, help="answers written together (%(default)s)")
    add_nproc(parser)
    add_decoding_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Run the sub-command.

    Returns:
        0, 130 after Ctrl-C, or the exit code of a rank that failed.
    """
    if arguments.action in ("prepare", "regenerate"):
        try:
            return _prepare(arguments) if arguments.action == "prepare" else _regenerate(arguments)
        except KeyboardInterrupt:
            say("interrupted; the same command continues from there")
            return INTERRUPTED
    if arguments.action == "show":
        init_runtime()
        from nemodiff_train.config.recipes import load_recipe
        from nemodiff_train.training.samples import show_samples

        show_samples(load_recipe(arguments.recipe, arguments.settings), arguments.count)
    elif arguments.action == "merge":
        init_without_device()
        from nemodiff_train.data.merge import merge

        _print_size(arguments.output, merge(arguments.shards, arguments.output, arguments.overwrite))
    else:
        from nemodiff_train.data.inspection import inspect

        inspect(arguments.prefix, arguments.verify)
    return 0


def _prepare(arguments: argparse.Namespace) -> int:
    init_without_device()
    from nemodiff_train.data.prepare import PrepareOptions, prepare

    fields = {name: getattr(arguments, name) for name in PrepareOptions.__dataclass_fields__}
    if checkpoint := Checkpoint.find(arguments.tokenizer):
        fields["tokenizer"] = str(checkpoint.tokenizer_directory)
    _print_size(arguments.output, prepare(PrepareOptions(**fields)))
    return 0


def _regenerate(arguments: argparse.Namespace) -> int:
    check_options(arguments)
    output = Path(arguments.output)
    if output.suffix != ".jsonl" or output.is_dir():
        raise UserError(f"--output {output}: name a file that ends in .jsonl, which 'nemodiff data prepare' reads")
    check_can_be_made(output.parent)
    checkpoint = Checkpoint.open(arguments.checkpoint).require_model()
    if arguments.nproc is not None:
        return start_ranks(arguments.command_line, arguments.nproc)
    init_runtime()
    from nemodiff_train.decoding.regeneration import RegenerateOptions, regenerate

    options = RegenerateOptions(**{name: getattr(arguments, name) for name in RegenerateOptions.__dataclass_fields__})
    with locked(output):
        regenerate(checkpoint, options, decoding_options(arguments))
    return 0


def _print_size(prefix: str, manifest: "Manifest") -> None:
    console.print(f"{prefix}: {manifest.documents:,} documents, {manifest.tokens:,} tokens", soft_wrap=True)
