"""A micro-batch from the loader to the device, with this rank's part of it."""

import time
from collections.abc import Iterator
from typing import Any

from torch import Tensor

from nemodiff_train.attention.context_parallel import ContextParallelShard
from nemodiff_train.objective.sample import Sample

_WHOLE = ("segment_ids",)  # every context-parallel rank needs all of it
_HOST = ("index",)  # seeds generators


def to_device(samples: Sample, shard: ContextParallelShard) -> Sample:
    """Move a micro-batch to the device and take this context-parallel rank's places.

    ``places`` is added: [n] indices of what carries loss in the flattened ``loss_mask``.  Found before the move, they
    cost the device no wait for the host.  ``index`` stays where it is, for the same reason.

    Args:
        samples: What the loader collated from :class:`~nemodiff_train.objective.sample.SampleMaker`'s fields.
        share: The rank's share of the sequence.
    """
    length = samples["maskable"].shape[1]

    def mine(name: str, values: Tensor) -> Tensor:
        if name in _HOST:
            return values
        values = values.cuda(non_blocking=True)
        return values if name in _WHOLE else shard.take(values, length)

    places = shard.take(samples["loss_mask"], length).flatten().nonzero()[:, 0]
    return {name: mine(name, values) for name, values in samples.items()} | {
        "loss_indices": places.cuda(non_blocking=True)
    }


class Recorder:
    """Passes a loader's micro-batches on and keeps them, so that a step can be looked at again."""

    def __init__(self) -> None:
        self.kept: list[list[Any]] | None = None
        """Micro-batches of the step by model chunk; None while nothing is kept."""
        self.waited = 0.0
        """Seconds that reading has taken."""

    def read(self, data: Iterator[Any], chunk: int) -> Any:
        """The next micro-batch of a model chunk."""
        started = time.perf_counter()
        samples = next(data)
        self.waited += time.perf_counter() - started
        if self.kept is not None:
            self.kept[chunk].append(samples)
        return samples
