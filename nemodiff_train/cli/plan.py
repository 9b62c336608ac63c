"""``nemodiff plan RECIPE --gpus N --gpu h100``: layouts with their memory and step time, best first."""

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from nemodiff_train.errors import UserError
from nemodiff_train.planning.hardware import GPUS, USABLE_MEMORY

if TYPE_CHECKING:
    from nemodiff_train.config.config import TriModeConfig
    from nemodiff_train.planning.layouts import Layout
    from nemodiff_train.planning.memory import Memory
    from nemodiff_train.planning.time import StepTime


@dataclass(frozen=True)
class Candidate:
    """A layout that fits."""

    layout: "Layout"
    memory: "Memory"
    time: "StepTime"
    tokens_per_second: float
    """Clean tokens of all GPUs together."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument("recipe", help="a page of recipes/ without .py, or the path of a Python file")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="the recipe's arguments, and overrides")
    parser.add_argument("--gpus", type=int, required=True, help="GPUs of the run")
    parser.add_argument("--gpu", choices=[*GPUS], default="h100", help="their kind (default h100)")
    parser.add_argument("--top", type=int, default=10, help="layouts to show (default 10)")
    parser.add_argument("--json", metavar="FILE", help="write all layouts that fit, in bytes and seconds")


def run(arguments: argparse.Namespace) -> None:
    """Print the layouts that fit."""
    if arguments.gpus < 1 or arguments.top < 1:
        raise UserError("--gpus and --top take a number above 0")
    from nemodiff_train.runtime import init_runtime

    init_runtime()
    from nemodiff_train.config.recipes import load_recipe

    found = plan(load_recipe(arguments.recipe, arguments.settings), arguments.gpus, arguments.gpu)
    if arguments.json:
        rows = [asdict(each) for each in found]
        try:
            Path(arguments.json).write_text(json.dumps(rows, indent=2) + "\n")
        except OSError as error:
            raise UserError(f"cannot write --json {arguments.json}: {error.strerror}; name another file") from None
    _show(found[: arguments.top], f"{len(found)} layouts fit {arguments.gpus} x {arguments.gpu}; estimates")


def plan(config: "TriModeConfig", gpus: int, kind: str) -> list[Candidate]:
    """Layouts whose memory fits, fastest first.

    Args:
        config: A recipe's; its own layout does not matter, its batch sizes do.
        gpus: GPUs of the run.
        kind: One of :data:`~nemodiff_train.planning.hardware.GPUS`.

    Raises:
        UserError: No layout divides model and batch, or none fits.
    """
    from nemodiff_train.planning.layouts import layouts
    from nemodiff_train.planning.memory import memory_of
    from nemodiff_train.planning.time import time_of
    from nemodiff_train.planning.workload import workload_of
    from nemodiff_train.validation import layout as rules
    from nemodiff_train.validation.settings import check_sizes

    check_sizes(config)

    work, gpu = workload_of(config), GPUS[kind]
    possible = [(layout, memory_of(work, layout)) for layout in layouts(config, gpus, rules.problems)]
    if not possible:
        raise UserError(
            f"no layout on {gpus} GPUs divides the model's {work.layers} layers and "
            f"train.global_batch_size={work.global_batch}; use another number of GPUs or another batch"
        )
    room = USABLE_MEMORY * gpu.memory
    found = []
    for layout, memory in possible:
        if memory.total <= room:
            time = time_of(work, layout, gpu)
            found.append(Candidate(layout, memory, time, work.global_batch * work.length / time.total))
    if not found:
        least = min(memory.total for _, memory in possible)
        raise UserError(
            f"no layout on {gpus} x {kind} fits: the least takes {least / 1e9:.1f} GB of a GPU, of which "
            f"{room / 1e9:.1f} GB can be used; use more GPUs or a smaller train.micro_batch_size"
        )
    return sorted(found, key=lambda each: each.time.total)


def _show(found: list[Candidate], title: str) -> None:
    shape = ("tensor", "pipe", "context", "data", "recompute")
    memory = ("weights", "grads", "optim", "activ", "logits", "GB")
    table = Table(*shape, *memory, "compute", "bubbles", "comm", "step, s", "tokens/s", title=title)
    for each in found:
        layout, bytes_, time = each.layout, each.memory, each.time
        sizes = (layout.tensor, layout.pipeline, layout.context, layout.data)
        parts = (bytes_.weights, bytes_.gradients, bytes_.optimizer, bytes_.activations, bytes_.logits, bytes_.total)
        seconds = (time.compute, time.bubbles, time.communication, time.total)
        table.add_row(
            *map(str, sizes),
            "full" if layout.recompute else "",
            *(f"{part / 1e9:.1f}" for part in parts),
            *(f"{part:.2f}" for part in seconds),
            f"{each.tokens_per_second:,.0f}",
        )
    console = Console(width=150)
    console.print(table)
    console.print(f"The first: {found[0].layout.settings}", soft_wrap=True)
