"""Layouts of a run with their estimated memory and step time, best first."""

from dataclasses import dataclass
from tempfile import TemporaryDirectory

from nemodiff_train.config.config import TriModeConfig
from nemodiff_train.config.recipes import load_recipe
from nemodiff_train.errors import UserError
from nemodiff_train.planning.hardware import GPUS, USABLE_MEMORY
from nemodiff_train.planning.layouts import Layout, layouts
from nemodiff_train.planning.memory import Memory, memory_of
from nemodiff_train.planning.time import StepTime, time_of
from nemodiff_train.planning.workload import workload_of
from recipes.published import SIZES


@dataclass(frozen=True)
class Candidate:
    """A layout that fits into memory."""

    layout: Layout
    memory: Memory
    time: StepTime
    tokens_per_second: float
    """Clean tokens per second on all GPUs together."""
    mfu: float
    """Share of the GPUs' peak that goes into operations that training needs."""
    days: float
    """Time of all steps of the run, without validation and checkpoints."""


def load_planned(recipe: str, settings: list[str]) -> TriModeConfig:
    """Return a run to plan; a recipe of a published size needs no model, data or output for it.

    Args:
        recipe: As :func:`~nemodiff_train.config.recipes.load_recipe` takes it.
        settings: Likewise, ``key=value``.
    """
    given = {word.partition("=")[0] for word in settings}
    family, _, rest = recipe.partition("_")
    size = SIZES.get(family, {}).get(rest.partition("_")[0])
    if size is None or "start_from" in given or not recipe.isidentifier():
        return load_recipe(recipe, settings)
    with TemporaryDirectory() as folder:
        size.config(family).save_pretrained(folder)
        assumed = {"start_from": folder, "data": "data", "output": "output"}
        more = [f"{name}={value}" for name, value in assumed.items() if name not in given]
        return load_recipe(recipe, [*settings, *more])


def plan(config: TriModeConfig, gpus: int, kind: str) -> list[Candidate]:
    """Return the layouts that fit into memory, fastest first.

    Args:
        config: The run; its own layout does not matter, its batch sizes do.
        gpus: Number of GPUs.
        kind: One of :data:`~nemodiff_train.planning.hardware.GPUS`.

    Raises:
        UserError: No layout divides model and batch, or none fits.
    """
    work, gpu = workload_of(config), GPUS[kind]
    memories = {layout: memory_of(work, layout) for layout in layouts(config, gpus)}
    if not memories:
        raise UserError(
            f"no layout on {gpus} GPUs divides the model's {work.layers} layers and "
            f"train.global_batch_size={work.global_batch}; use another number of GPUs or another batch"
        )
    usable = USABLE_MEMORY * gpu.memory
    candidates = []
    for layout, memory in memories.items():
        if memory.total <= usable:
            time = time_of(work, layout, gpu)
            samples = work.global_batch / time.total  # per second
            mfu = samples * work.flops / (gpus * gpu.flops)
            days = config.train.train_iters * time.total / 86_400
            candidates.append(Candidate(layout, memory, time, samples * work.length, mfu, days))
    if not candidates:
        least = min(memory.total for memory in memories.values())
        raise UserError(
            f"no layout on {gpus} x {kind} fits: the least takes {least / 1e9:.1f} GB per GPU, of which "
            f"{usable / 1e9:.1f} GB can be used; use more GPUs or a smaller train.micro_batch_size"
        )
    return sorted(candidates, key=lambda candidate: candidate.time.total)
