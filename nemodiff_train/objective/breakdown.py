"""The diffusion loss by noise level and by position in the block."""

import torch
import torch.distributed as dist
from torch import Tensor

from nemodiff_train.objective.sample import Sample

LEVELS = 10
"""Buckets of the noise level: 0.0-0.1, 0.1-0.2, ..."""
OCTAVES = 12
"""Buckets of the position in the block, from 1: 1, 2, 3-4, 5-8, ... 1025-2048."""


class Breakdown:
    """Adds up the unweighted losses of masked positions by bucket."""

    def __init__(self) -> None:
        self.totals: Tensor | None = None
        """[2, LEVELS + OCTAVES] sums of losses in nats, and their numbers; None before the first micro-batch."""

    def add(self, batch: Sample, losses: Tensor) -> None:
        """Add one micro-batch.

        Args:
            batch: With ``noise_level`` and ``index_in_block`` [batch, V L]; see
                :class:`~nemodiff_train.objective.sample.SampleMaker`.
            losses: [batch, (V + 1) L] cross-entropy in nats.
        """
        if self.totals is None:
            self.totals = torch.zeros(2, LEVELS + OCTAVES, device=losses.device)
        noisy = batch["noise_level"].shape[1]
        # Every noisy position with a factor of 0 or 1: selecting the masked ones would make the host wait.
        masked = (batch["loss_mask"][:, :noisy] > 0).float().flatten()
        loss = losses[:, :noisy].flatten() * masked
        # Bucket of each position, [batch * V L]: floor(10 t), and ceil(log2(position)).
        level = (batch["noise_level"].flatten() * LEVELS).long().clamp(max=LEVELS - 1)
        octave = torch.log2(batch["index_in_block"].flatten().float() + 1).ceil().long().clamp(max=OCTAVES - 1)
        for bucket in (level, LEVELS + octave):
            self.totals[0].index_add_(0, bucket, loss)
            self.totals[1].index_add_(0, bucket, masked)

    def take(self, group: dist.ProcessGroup) -> dict[str, float]:
        """Return the mean of each bucket over the ranks of ``group`` since the last call; empty ones are left out."""
        if self.totals is None:
            return {}
        dist.all_reduce(self.totals, group=group)
        sums, counts = self.totals.tolist()
        self.totals = None
        levels = [f"diffusion_loss_by_noise_level/{i / LEVELS:.1f}-{(i + 1) / LEVELS:.1f}" for i in range(LEVELS)]
        octaves = ["1", "2", *(f"{2 ** (i - 1) + 1}-{2**i}" for i in range(2, OCTAVES))]
        names = levels + [f"diffusion_loss_by_position/{octave}" for octave in octaves]
        return {name: sums[i] / counts[i] for i, name in enumerate(names) if counts[i]}
