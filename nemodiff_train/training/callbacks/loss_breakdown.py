"""The diffusion loss by noise level and by place in the block."""

import torch
import torch.distributed as dist
from torch import Tensor

from nemodiff_train.objective.sample import Sample

LEVELS = 10
OCTAVES = 12  # of the place in the block: 1, 2, 3-4, 5-8, ... 1025-2048


class LossTally:
    """Adds up the unweighted losses of masked places over the micro-batches of some steps."""

    def __init__(self) -> None:
        self.totals: Tensor | None = None
        """[2, levels + octaves] sums of losses in nats, and their numbers."""

    def add(self, batch: Sample, losses: Tensor) -> None:
        """Add one micro-batch.

        Args:
            batch: With ``level`` and ``slot``; see :class:`~nemodiff_train.objective.sample.SampleMaker`.
            losses: [batch, positions] cross-entropy in nats.
        """
        if self.totals is None:
            self.totals = torch.zeros(2, LEVELS + OCTAVES, device=losses.device)
        noisy = batch["level"].shape[1]
        # All places, each with its part in the sums: to pick the masked ones, the host would wait for the device.
        masked = (batch["loss_mask"][:, :noisy] > 0).float().flatten()
        loss = losses[:, :noisy].float().flatten() * masked
        level = (batch["level"].flatten() * LEVELS).long().clamp(max=LEVELS - 1)
        octave = torch.log2(batch["slot"].flatten().float() + 1).ceil().long().clamp(max=OCTAVES - 1)
        for bucket in (level, LEVELS + octave):
            self.totals[0].index_add_(0, bucket, loss)
            self.totals[1].index_add_(0, bucket, masked)

    def take(self, group: dist.ProcessGroup) -> dict[str, float]:
        """Means over the ranks of ``group`` since the last call, by name; buckets without a place are left out."""
        if self.totals is None:
            return {}
        dist.all_reduce(self.totals, group=group)
        sums, counts = self.totals.tolist()
        self.totals = None
        return {name: sums[i] / counts[i] for i, name in enumerate(_names()) if counts[i]}


def _names() -> list[str]:
    levels = [f"diffusion_loss_by_noise_level/{i / LEVELS:.1f}-{(i + 1) / LEVELS:.1f}" for i in range(LEVELS)]
    octaves = [(1, 1), *((2 ** (i - 1) + 1, 2**i) for i in range(1, OCTAVES))]
    places = [f"diffusion_loss_by_position/{low}" + (f"-{high}" if high > low else "") for low, high in octaves]
    return levels + places
