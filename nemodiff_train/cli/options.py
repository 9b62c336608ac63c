"""Options of the verbs that decode: the settings of decoding, a drafter, a sampler."""

import argparse
from dataclasses import fields
from typing import Any

from nemodiff_train.cli.ranks import add_extend, add_model_parallel
from nemodiff_train.decoding.generation import DecodingSettings
from nemodiff_train.model.checkpoint import Checkpoint
from nemodiff_train.sampler.description import check_sampler

_HELP: dict[str, str] = {
    "max_new_tokens": "exact limit on new tokens",
    "temperature": "0: greedy; above 0: sample from softmax(logits / temperature)",
    "top_k": "sample from the k most probable tokens; 0 for all",
    "top_p": "sample from the most probable tokens that together reach this probability",
    "seed": "sampling seed",
    "policy": "which positions block diffusion unmasks: threshold, leftmost, entropy, fixed or trained",
    "entropy_bound": "nats, for --policy entropy",
    "steps": "forwards per block, for --policy fixed",
    "tree_nodes": "positions that mode tree verifies at once",
    "tree_width": "candidates per position, for mode tree",
    "search_budget": "forwards the oracle may spend on a prompt",
}


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
