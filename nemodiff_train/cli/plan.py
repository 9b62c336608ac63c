"""``nemodiff plan RECIPE --gpus N --gpu h100``: layouts with their memory and step time, best first."""

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table

from nemodiff_train.cli.ranks import at_least_1
from nemodiff_train.console import PlainConsole
from nemodiff_train.errors import UserError
from nemodiff_train.planning.hardware import GPUS
from nemodiff_train.runtime import init_runtime

if TYPE_CHECKING:
    from nemodiff_train.planning.candidates import Candidate


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments."""
    parser.add_argument("recipe", help="a function in recipes/, or FILE.py[:function]")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="the recipe's arguments, and overrides")
    parser.add_argument("--gpus", type=at_least_1, required=True, help="GPUs of the run")
    parser.add_argument("--gpu", choices=[*GPUS], default="h100", help="their kind (default h100)")
    parser.add_argument("--top", type=at_least_1, default=10, help="layouts to show (default 10)")
    parser.add_argument("--json", metavar="FILE", help="write all layouts that fit, in bytes and seconds")


def run(arguments: argparse.Namespace) -> None:
    """Print the layouts that fit."""
    init_runtime()
    from nemodiff_train.planning.candidates import load_planned, plan
    from nemodiff_train.validation.settings import check_sizes

    config = load_planned(arguments.recipe, arguments.settings)
    check_sizes(config)
    candidates = plan(config, arguments.gpus, arguments.gpu)
    if arguments.json:
        rows = [asdict(candidate) for candidate in candidates]
        try:
            Path(arguments.json).write_text(json.dumps(rows, indent=2) + "\n")
        except OSError as error:
            raise UserError(f"cannot write --json {arguments.json}: {error.strerror}; name another file") from None
    _show(candidates[: arguments.top], f"{len(candidates)} layouts fit {arguments.gpus} x {arguments.gpu}; estimates")
    console, best = PlainConsole(), candidates[0]
    console.print(f"The first: {best.layout.settings}", soft_wrap=True)
    tokens = config.train.train_iters * config.train.global_batch_size * config.dataset.seq_length
    console.print(
        f"Its {config.train.train_iters:,} steps of {tokens:,} tokens in all take {best.days:,.1f} days: "
        f"{best.days * 24 * arguments.gpus:,.0f} GPU hours",
        soft_wrap=True,
    )


def _show(candidates: list["Candidate"], title: str) -> None:
    shape = ("tensor", "pipe", "context", "data", "recompute")
    memory = ("weights", "grads", "optim", "activ", "logits", "GB")
    table = Table(*shape, *memory, "compute", "bubbles", "comm", "step, s", "tokens/s", "MFU", "days", title=title)
    for candidate in candidates:
        layout, bytes_, time = candidate.layout, candidate.memory, candidate.time
        sizes = (layout.tensor, layout.pipeline, layout.context, layout.data)
        parts = (bytes_.weights, bytes_.gradients, bytes_.optimizer, bytes_.activations, bytes_.logits, bytes_.total)
        seconds = (time.compute, time.bubbles, time.communication, time.total)
        table.add_row(
            *map(str, sizes),
            "full" if layout.recompute else "",
            *(f"{part / 1e9:.1f}" for part in parts),
            *(f"{part:.2f}" for part in seconds),
            f"{candidate.tokens_per_second:,.0f}",
            f"{candidate.mfu:.0%}",
            f"{candidate.days:,.1f}",
        )
    PlainConsole(width=160).print(table)
