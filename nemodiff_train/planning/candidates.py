"""Layouts of a run with their estimated memory and step time, best first."""

from dataclasses import dataclass

from nemodiff_train.config.config import TriModeConfig
from nemodiff_train.errors import UserError
from nemodiff_train.planning.hardware import GPUS, USABLE
from nemodiff_train.planning.layouts import Layout, layouts
from nemodiff_train.planning.memory import Memory, memory_of
from nemodiff_train.planning.time import StepTime, time_of
from nemodiff_train.planning.workload import workload_of


@dataclass(frozen=True)
class Candidate:
    """A layout that fits."""

    layout: Layout
    memory: Memory
    time: StepTime
    tokens_per_second: float
    """Clean tokens of all GPUs together."""


def plan(config: TriModeConfig, gpus: int, kind: str) -> list[Candidate]:
    """Layouts whose memory fits, fastest first.

    Args:
        config: A recipe's; its own layout does not matter, its batch sizes do.
        gpus: GPUs of the run.
        kind: One of :data:`~nemodiff_train.planning.hardware.GPUS`.

    Raises:
        UserError: No layout divides model and batch, or none fits.
    """
    work, gpu = workload_of(config), GPUS[kind]
    possible = [(layout, memory_of(work, layout)) for layout in layouts(config, gpus)]
    if not possible:
        raise UserError(
            f"no layout on {gpus} GPUs divides the model's {work.layers} layers and "
            f"train.global_batch_size={work.global_batch}; use another number of GPUs or another batch"
        )
    room = USABLE * gpu.memory
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
