"""A micro-batch from the loader to the device: this context-parallel rank's positions of it."""

import time
from collections.abc import Iterator

import torch
import torch.distributed as dist
from megatron.core.models.gpt import GPTModel
from megatron.core.num_microbatches_calculator import get_num_microbatches
from torch import Tensor

from nemodiff_train.attention.context_parallel import ContextParallelShard
from nemodiff_train.config.config import TriModeConfig
from nemodiff_train.config.context import StepContext
from nemodiff_train.objective.sample import Sample
from nemodiff_train.runtime.memory import copied_to


class BatchReader:
    """Read the micro-batches of this process's model chunks.

    Args:
        step_context: Where the time spent waiting for the loader is added up.
    """

    def __init__(self, step_context: StepContext) -> None:
        self.step_context = step_context
        self.diffusion_scale: Tensor | float = 1.0
        """AR targets per masked position in the step's global batch, for ``reduction=automodel``; else 1."""
        self._ahead: list[Sample] = []

    def read(self, data_iterator: Iterator[Sample], config: TriModeConfig, chunk: GPTModel) -> Sample | None:
        """Return a model chunk's next micro-batch; None on a stage that needs nothing of it."""
        if not (chunk.pre_process or chunk.post_process or config.dataset.needs_segment_ids):
            return None
        shard = chunk.attention_state.shard
        if config.objective.reduction != "automodel" or not (chunk.training and chunk.post_process):
            return self._next(data_iterator, shard)
        # The masked positions of the whole step scale its diffusion loss, so the step is read at once.
        if not self._ahead:
            self._ahead = [self._next(data_iterator, shard) for _ in range(get_num_microbatches())]
            self.diffusion_scale = _targets_per_masked(self._ahead, chunk.pg_collection.dp_cp)
        return self._ahead.pop(0)

    def _next(self, data_iterator: Iterator[Sample], shard: ContextParallelShard) -> Sample:
        started = time.perf_counter()
        samples = next(data_iterator)
        self.step_context.data_wait += time.perf_counter() - started
        return to_device(samples, shard)


def to_device(samples: Sample, shard: ContextParallelShard) -> Sample:
    """Move a micro-batch to the device and take this context-parallel rank's positions.

    ``loss_indices`` is added: [n] indices of what carries loss in the flattened ``loss_mask``.  They are computed
    before the move, so that the host need not wait for the device; ``index`` stays on the host for the same reason,
    and so does a second ``segment_ids``, ``host_segment_ids``.

    Args:
        samples: The fields of :class:`~nemodiff_train.objective.sample.SampleMaker`, each with a batch axis in front.
        shard: The rank's shard of the sequence.
    """
    length = samples["maskable"].shape[1]
    # [n] indices into the flattened loss mask of this rank, [batch * (V + 1) L / ranks].
    loss_indices = shard.take(samples["loss_mask"], length).flatten().nonzero()[:, 0]
    batch = {"index": samples["index"], "host_segment_ids": samples["segment_ids"]}
    for name, values in samples.items():
        if name == "segment_ids":  # attention needs those of all ranks
            batch[name] = values.cuda(non_blocking=True)
        elif name != "index":
            batch[name] = shard.take(values.cuda(non_blocking=True), length)
    batch["loss_indices"] = copied_to(batch["loss_mask"].device, loss_indices)
    return batch


def _targets_per_masked(batches: list[Sample], group: dist.ProcessGroup) -> Tensor:
    """Return the AR targets per masked position in the global batch, a scalar, from this rank's part of a step."""
    length = batches[0]["maskable"].shape[1]
    views = batches[0]["loss_mask"].shape[1] // length - 1
    # Masked positions, a mean over views, and AR targets: scalars of this rank, then sums over all replicas.
    masked = sum((batch["loss_mask"][:, : views * length] > 0).sum() for batch in batches) / views
    targets = sum(batch["loss_mask"][:, views * length :].sum() for batch in batches)
    counts = torch.stack([torch.as_tensor(targets), torch.as_tensor(masked)]).float()
    dist.all_reduce(counts, group=group)
    return counts[0] / counts[1].clamp(min=1)
