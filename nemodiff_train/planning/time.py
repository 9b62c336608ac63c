"""Time of a training step, with no communication overlapped with computation."""

from dataclasses import dataclass

from nemodiff_train.planning.hardware import (
    ATTENTION_EFFICIENCY,
    COLLECTIVE_EFFICIENCY,
    MATRIX_EFFICIENCY,
    NODE,
    Gpu,
)
from nemodiff_train.planning.layouts import Layout
from nemodiff_train.planning.memory import estimated_stage
from nemodiff_train.planning.workload import Workload


@dataclass(frozen=True)
class StepTime:
    """Seconds per step."""

    compute: float
    bubbles: float
    """Waiting for the pipeline to fill and to drain."""
    communication: float
    optimizer: float

    @property
    def total(self) -> float:
        """Return the sum in seconds."""
        return self.compute + self.bubbles + self.communication + self.optimizer


def time_of(work: Workload, layout: Layout, gpu: Gpu) -> StepTime:
    """Return the time of a step, as long as the slowest pipeline stage: the last one, with the output layer."""
    compute = _micro_batch_compute(work, layout, gpu)
    communication = _micro_batch_communication(work, layout, gpu)
    parameters = estimated_stage(work, layout, layout.pipeline - 1).trained
    replicas = layout.data * layout.context
    updated = parameters / (replicas if work.sharded else 1)  # by each rank
    # Gradients in fp32 are summed over the data-parallel ranks, and the weights sent back.
    returned = work.bytes_per_element if work.sharded else 4
    reduction = _ring(parameters * (4 + returned), replicas) / _speed(gpu, layout.tensor * replicas)
    return StepTime(
        compute=layout.micro_batches * compute,
        bubbles=(layout.pipeline - 1) * (compute + communication),  # 1F1B: (p - 1) / m of the rest
        communication=layout.micro_batches * communication + reduction,
        # Reads gradients; reads and writes weight and both moments in fp32; writes the weight.
        optimizer=updated * (4 + 2 * 12 + work.bytes_per_element) / gpu.bandwidth,
    )


def _micro_batch_compute(work: Workload, layout: Layout, gpu: Gpu) -> float:
    # One more forward pass is a third of forward and backward.
    forward_again = 4 / 3 if layout.recompute and work.backward else 1.0
    layers = work.matrix_flops / MATRIX_EFFICIENCY + work.attention_flops / ATTENTION_EFFICIENCY
    seconds = layers * forward_again / layout.pipeline + work.head_flops / MATRIX_EFFICIENCY
    return work.micro_batch * seconds / (layout.tensor * layout.context * gpu.flops)


def _micro_batch_communication(work: Workload, layout: Layout, gpu: Gpu) -> float:
    layers = work.layers / layout.pipeline
    passes = (3 if layout.recompute else 2) if work.backward else 1
    states = work.micro_batch * work.positions / layout.context * work.hidden * work.bytes_per_element
    # Tensor groups: a gather and a scatter around attention and around the feed-forward layer, in each pass.
    tensor = layers * passes * 4 * _ring(states, layout.tensor) / _speed(gpu, layout.tensor)
    # Context groups: the clean keys and values of the sample, in each pass.
    clean = work.micro_batch * 2 * work.length * work.key_channels / layout.tensor * work.bytes_per_element
    group_span = layout.tensor * layout.context
    context = layers * passes * _ring(clean, layout.context) / _speed(gpu, group_span)
    # Pipeline: the states forward, and their gradient back.
    states_sent = states / layout.tensor if layout.pipeline > 1 else 0.0
    return tensor + context + 2 * states_sent / _speed(gpu, group_span * layout.data * 2)


def _ring(size: float, ranks: int) -> float:
    """Return the bytes that a rank sends in a gather or a scatter of ``size`` bytes."""
    return size * (ranks - 1) / ranks


def _speed(gpu: Gpu, group_span: int) -> float:
    """Return the bytes per second in a group of this span; groups are in the order tensor, context, data."""
    return COLLECTIVE_EFFICIENCY * (gpu.link if group_span <= NODE else gpu.network)
