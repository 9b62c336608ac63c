"""The size of a step: where it is far beyond any machine, it is refused with its estimate."""

from collections.abc import Iterator

import psutil
import torch

from nemodiff_train.config.config import TriModeConfig
from nemodiff_train.planning.layouts import layout_of
from nemodiff_train.planning.memory import memory_of
from nemodiff_train.planning.workload import workload_of
from nemodiff_train.runtime import init_runtime
from nemodiff_train.runtime.memory import GB

_BEYOND = 4
"""Multiple of a device's memory from which on the estimate, which is not exact, leaves no doubt."""
_MOST_SAMPLES = 1 << 24
"""Largest number of samples per step: Megatron lists the micro-batches of a step, or a validation, in memory."""
_ORDER_BYTES = 16
"""Bytes per sample of the order, which every rank holds: Megatron's document, offset and index in the shuffle."""
_ORDER_FRACTION = 0.25
"""Fraction of a machine's memory that the order may take: computing it takes copies."""
_FASTEST = 100
"""Steps per second beyond those of any run."""
_YEAR = 365 * 24 * 3600
"""Seconds of the longest run at that speed."""


def problems(config: TriModeConfig, world_size: int) -> Iterator[str]:
    """Yield what no device could hold, one line each; ``world_size`` ranks can have the layout."""
    batch, steps, validation = config.train.global_batch_size, config.train.train_iters, config.validation
    if batch > _MOST_SAMPLES:
        yield f"train.global_batch_size is {batch:,}; use {_MOST_SAMPLES:,} or fewer"
    if steps > _YEAR * _FASTEST:
        years = steps / _FASTEST / _YEAR
        yield f"train.train_iters is {steps:,}: {years:,.0f} years at {_FASTEST} steps per second; use fewer"
    validations = steps // validation.eval_interval + 1 if validation.eval_interval else 1
    validation_steps = (validation.eval_iters or 0) * validations
    for name, count in (("train.train_iters", steps), ("validation.eval_iters", validation_steps)):
        if (order := count * batch * _ORDER_BYTES) > _ORDER_FRACTION * psutil.virtual_memory().total:
            yield (
                f"{name} makes {count:,} steps of train.global_batch_size={batch:,} samples, whose order alone takes "
                f"about {order / GB:,.0f} GB of memory; lower one of them"
            )
    cuda = init_runtime().cuda
    memory = torch.cuda.get_device_properties(0).total_memory if cuda else psutil.virtual_memory().total
    work = workload_of(config)
    needed = memory_of(work, layout_of(config, world_size), "cuda" if cuda else "cpu").total
    if needed > _BEYOND * max(memory, 80 * GB):
        yield (
            f"a step would take about {needed / GB:,.0f} GB on each device: {work.micro_batch} samples of "
            f"{work.positions:,} positions (dataset.seq_length={work.length}, {work.views} views) through "
            f"{work.layers} layers; lower train.micro_batch_size, dataset.seq_length or objective.views"
        )
