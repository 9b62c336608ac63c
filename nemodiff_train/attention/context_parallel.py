"""Context parallelism: which positions a rank holds, in which order its keys are, and what ranks exchange.

The exchange itself, one collective per layer, is :func:`nemodiff_train.attention.modules.exchange_keys`.
"""

import functools
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from nemodiff_train.objective.rule import CLEAN

DUPLICATE = -2
"""The ``view`` of received keys that a rank already holds; the rule lets no query attend to it."""


@dataclass(frozen=True)
class ContextParallelShard:
    """One rank's part of a sample: the same positions of every noisy view and of the clean half.

    The L positions are cut into 2 * size chunks. Rank r holds chunks r and 2 * size - 1 - r, so that all ranks
    have equally many earlier keys to attend to.
    """

    rank: int = 0
    size: int = 1

    def chunks(self, length: int) -> list[tuple[int, int]]:
        """Return the (first, end) positions of this rank's chunks of a sample of ``length`` tokens."""
        if self.size == 1:
            return [(0, length)]
        chunk = length // (2 * self.size)
        return [(number * chunk, (number + 1) * chunk) for number in (self.rank, 2 * self.size - 1 - self.rank)]

    def positions(self, length: int, device: torch.device | str = "cpu") -> Tensor:
        """Return this rank's positions, ascending: [length / size] int64."""
        return torch.cat([torch.arange(first, end, device=device) for first, end in self.chunks(length)])

    def take(self, values: Tensor, length: int) -> Tensor:
        """Take this rank's part of whole samples.

        Args:
            values: [batch, copies * length], for any number of copies (noisy views and the clean half).
            length: Clean tokens of a sample, L.

        Returns:
            [batch, copies * length / size].
        """
        if self.size == 1:
            return values
        # [batch, copies, L], of which this rank's positions are [batch, copies, L / size].
        copies = values.view(len(values), -1, length)
        return copies[:, :, self.positions(length, values.device)].flatten(1)

    def gather(self, values: Tensor, length: int, group: ProcessGroup | None) -> Tensor:
        """Return the values of all ranks by position: [batch, length, ...]; no gradient passes.

        Args:
            values: [batch, length / size, ...] this rank's.
            length: Number of positions; as many chunks as :meth:`chunks` cuts, or whole chunks of them.
            group: The context-parallel process group.
        """
        if self.size == 1:
            return values
        # Per rank [batch, length / size, ...], which side by side are brought into the order of positions.
        parts = [torch.empty_like(values) for _ in range(self.size)]
        dist.all_gather(parts, values.contiguous(), group=group)
        positions = torch.cat([ContextParallelShard(rank, self.size).positions(length) for rank in range(self.size)])
        return torch.cat(parts, dim=1)[:, positions.argsort().to(values.device)]

    def shift_right(self, values: Tensor, group: ProcessGroup | None) -> Tensor:
        """Return for each of this rank's positions the value of the one before; position 0 gets an arbitrary value.

        Args:
            values: [batch, L / size, ...] this rank's; no gradient passes.
            group: The context-parallel process group.
        """
        # The value of the position before, but at the first position of a chunk, where another rank may hold it.
        rolled = values.roll(1, dims=1)
        if self.size > 1:
            ends = values.unflatten(1, (2, -1))[:, :, -1]  # [batch, 2, ...] of each chunk
            ends = self.gather(ends, 2 * self.size, group)
            rolled.unflatten(1, (2, -1))[:, :, 0] = ends[:, self.positions(2 * self.size) - 1]
        return rolled


@dataclass(frozen=True, eq=False)
class KeyQueryLayout:
    """Order of one rank's queries and keys, and what it exchanges; the same whatever a sample's blocks are.

    Queries are the rank's part of ``[noisy views | clean]``. Keys are ``[own noisy | halo | clean]``: the rank's own
    noisy positions, the noisy positions of all ranks near the ends of their chunks, and all L clean positions.
    """

    query_view: Tensor
    """[queries] noisy view of each query, or ``CLEAN``."""
    query_position: Tensor
    """[queries] int64."""
    key_view: Tensor
    """[keys] noisy view of each key, ``CLEAN`` or :data:`DUPLICATE`."""
    key_position: Tensor
    """[keys] int64."""
    sent: Tensor
    """[clean and halo positions of this rank] indices into its own positions: what it sends."""
    received: Tensor
    """[halo + L] indices into what all ranks sent, in the order of the keys."""


# Cached: constructing the indices makes the host wait for the device.
@functools.lru_cache(maxsize=16)
def key_query_layout(
    views: int, length: int, shard: ContextParallelShard, halo: int, device: torch.device
) -> KeyQueryLayout:
    """Lay out the queries and keys of a rank.

    Args:
        views: Noisy views, V.
        length: Clean tokens of a sample, L.
        shard: The rank.
        halo: Number of positions by which a block may extend beyond a chunk.
        device: Where the indices are needed.
    """
    # [(V + 1) L / size] view and position of each query, ``[noisy views | clean]``.
    positions = shard.positions(length, device)
    query_view = torch.tensor([*range(views), CLEAN], device=device).repeat_interleave(len(positions))
    query_position = positions.repeat(views + 1)
    noisy = slice(0, views * len(positions))
    clean = torch.arange(length, device=device)
    sent, received, halo_view, halo_position = _halo_exchange(views, length, shard, halo, device)
    # A rank receives its own halo back as well: these keys must not count twice.
    halo_view = halo_view.where(~torch.isin(halo_position, positions), DUPLICATE)
    # [keys] the same of each key, ``[own noisy | halo | clean]``.
    key_view = torch.cat([query_view[noisy], halo_view, torch.full_like(clean, CLEAN)])
    key_position = torch.cat([query_position[noisy], halo_position, clean])
    return KeyQueryLayout(query_view, query_position, key_view, key_position, sent, received)


def _halo_exchange(
    views: int, length: int, shard: ContextParallelShard, halo: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return ``sent`` and ``received`` of a layout, and the view and the position of each halo key."""
    if shard.size == 1:
        empty = torch.empty(0, dtype=torch.long, device=device)
        return empty, empty, empty, empty
    # [ranks, n] positions of every rank, and [h] indices of those within ``halo`` of an end of a chunk: on all
    # ranks the same, since their chunks are equally long.
    ranks = [ContextParallelShard(rank, shard.size) for rank in range(shard.size)]
    positions = torch.stack([rank.positions(length, device) for rank in ranks])
    n, chunk = positions.shape[1], length // (2 * shard.size)
    in_chunk = torch.arange(n, device=device) % chunk
    near_end = ((in_chunk < halo) | (in_chunk >= chunk - halo)).nonzero()[:, 0]
    # [n + V h] a rank sends its clean half, which lies after its V noisy views of n, then the halo of each view.
    view = torch.arange(views, device=device)
    clean = torch.arange(views * n, (views + 1) * n, device=device)
    sent = torch.cat([clean, (view[:, None] * n + near_end).flatten()])
    # [ranks, n] and [ranks, V h] rows of both in the concatenation of what all ranks sent.
    row = torch.arange(shard.size * len(sent), device=device).view(shard.size, -1)
    clean_row = torch.empty(length, dtype=torch.long, device=device)
    clean_row[positions] = row[:, :n]
    received = torch.cat([row[:, n:].flatten(), clean_row])
    halo_view = view.repeat_interleave(len(near_end)).repeat(shard.size)
    halo_position = positions[:, near_end].repeat(1, views).flatten()
    return sent, received, halo_view, halo_position
