"""Time of a training step, with nothing overlapped."""

from dataclasses import dataclass

from nemodiff_train.planning.hardware import ATTENTION, COLLECTIVE, MATRIX, NODE, Gpu
from nemodiff_train.planning.layouts import Layout
from nemodiff_train.planning.memory import trained_parameters
from nemodiff_train.planning.workload import Workload


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step."""

    compute: float
    bubbles: float
    """Waiting for the pipeline to fill and to drain."""
    communication: float
    optimizer: float

    @property
    def total(self) -> float:
        """Seconds."""
        return self.compute + self.bubbles + self.communication + self.optimizer


def time_of(work: Workload, layout: Layout, gpu: Gpu) -> StepTime:
    """The slowest pipeline stage sets the pace: the last one, which has the output layer."""
    computing = _micro_batch_compute(work, layout, gpu)
    talking = _micro_batch_communication(work, layout, gpu)
    parameters = trained_parameters(work, layout, True)
    shards = layout.data * layout.context if work.sharded else 1
    return StepTime(
        compute=layout.micro_batches * computing,
        bubbles=(layout.pipeline - 1) * (computing + talking),  # 1F1B: (p - 1) / m of the rest
        communication=layout.micro_batches * talking + _gradients(work, layout, gpu, parameters),
        # Reads gradients; reads and writes weight and both moments in fp32; writes the weight.
        optimizer=parameters / shards * (4 + 2 * 12 + work.width) / gpu.bandwidth,
    )


def _micro_batch_compute(work: Workload, layout: Layout, gpu: Gpu) -> float:
    again = 4 / 3 if layout.recompute else 1.0  # one more forward pass, a third of forward and backward
    layers = work.matrix_flops / MATRIX + work.attention_flops / ATTENTION
    seconds = layers * again / layout.pipeline + work.head_flops / MATRIX
    return work.micro_batch * seconds / (layout.tensor * layout.context * gpu.flops)


def _micro_batch_communication(work: Workload, layout: Layout, gpu: Gpu) -> float:
    layers = work.layers / layout.pipeline
    passes = 3 if layout.recompute else 2
    states = work.micro_batch * work.positions / layout.context * work.hidden * work.width
    # A gather and a scatter around attention and around the feed-forward, in each pass.
    tensor = layers * passes * 4 * _ring(states, layout.tensor) / _speed(gpu, layout.tensor)
    clean = work.micro_batch * 2 * work.length * work.keys / layout.tensor * work.width
    reach = layout.tensor * layout.context
    context = layers * passes * _ring(clean, layout.context) / _speed(gpu, reach)
    sent = states / layout.tensor if layout.pipeline > 1 else 0.0
    return tensor + context + 2 * sent / _speed(gpu, reach * layout.data * 2)


def _gradients(work: Workload, layout: Layout, gpu: Gpu, parameters: float) -> float:
    """Gradients in fp32 to their sum, and weights back, over the data-parallel ranks."""
    group = layout.data * layout.context
    back = work.width if work.sharded else 4
    return _ring(parameters * (4 + back), group) / _speed(gpu, layout.tensor * group)


def _ring(size: float, ranks: int) -> float:
    """Bytes that a rank sends in a gather or a scatter of ``size`` bytes."""
    return size * (ranks - 1) / ranks


def _speed(gpu: Gpu, reach: int) -> float:
    """Bytes a second to ranks that are ``reach`` GPUs apart; tensor groups come first, then context, then data."""
    return COLLECTIVE * (gpu.link if reach <= NODE else gpu.network)
