"""Who attends to whom in a training pass: the rule laid out for one rank, the same for all layers."""

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from nemodiff_train.attention.tiles import Runs, block_mask
from nemodiff_train.objective.rule import CLEAN, Positions, can_attend

# Queries that one SDPA call takes at a time: enough to keep the call busy, few enough that little of
# its mask is empty.
QUERY_GROUP = 128

NOBODY = -2
"""The ``view`` of received keys that this rank has already."""


@dataclass(frozen=True)
class ContextParallelShard:
    """One rank's part of the sequence under context parallelism: the same places of every view and of the clean half.

    L places are cut into 2 * size chunks; rank r has chunks r and 2 * size - 1 - r, so that all ranks
    have as many earlier keys to look at.
    """

    rank: int = 0
    size: int = 1

    def runs(self, length: int) -> list[tuple[int, int]]:
        """The contiguous places of this rank, as (start, end)."""
        if self.size == 1:
            return [(0, length)]
        chunk = length // (2 * self.size)
        return [(part * chunk, (part + 1) * chunk) for part in (self.rank, 2 * self.size - 1 - self.rank)]

    def places(self, length: int, device: torch.device | str = "cpu") -> Tensor:
        """[L / size] places of this rank, in order."""
        return torch.cat([torch.arange(start, end, device=device) for start, end in self.runs(length)])

    def take(self, states: Tensor, length: int) -> Tensor:
        """This rank's part of [batch, segments * L]: [batch, segments * L / size]."""
        if self.size == 1:
            return states
        segments = states.view(len(states), -1, length)
        return segments[:, :, self.places(length, states.device)].flatten(1)


@dataclass(frozen=True, eq=False)
class KeyQueryLayout:
    """Which positions a rank has and in which order keys reach it: the same whatever a sample's blocks."""

    queries: tuple[Tensor, Tensor]
    """[queries] view and place of each."""
    keys: tuple[Tensor, Tensor]
    """[keys] likewise."""
    sent: Tensor
    """Own positions to send."""
    received: Tensor
    """Rows of what all ranks sent, reordered to ``[edges | clean in place order]``."""


# Made once: counting and choosing positions makes the host wait for the device.
@functools.lru_cache(maxsize=16)
def _arrangement(
    views: int, length: int, shard: ContextParallelShard, reach: int, device: torch.device
) -> KeyQueryLayout:
    mine = shard.places(length, device)
    view = torch.tensor([*range(views), CLEAN], device=device).repeat_interleave(len(mine))
    place = mine.repeat(views + 1)
    noisy = views * len(mine)
    sent, received, (edge_view, edge_place) = _exchange(views, length, shard, reach, device)
    # Keys that this rank has already arrive again with the others', and are seen by nobody then.
    edge_view = edge_view.where(~torch.isin(edge_place, mine), NOBODY)
    clean = torch.arange(length, device=device)
    key_view = torch.cat([view[:noisy], edge_view, torch.full_like(clean, CLEAN)])
    key_place = torch.cat([place[:noisy], edge_place, clean])
    return KeyQueryLayout((view, place), (key_view, key_place), sent, received)


@functools.lru_cache(maxsize=16)
def _runs(arrangement: KeyQueryLayout, tile: tuple[int, int]) -> tuple[Runs, Runs]:
    """Queries and keys, cut for FlexAttention's tiles."""
    return Runs.of(*arrangement.queries, tile[0]), Runs.of(*arrangement.keys, tile[1])


def _exchange(
    views: int, length: int, shard: ContextParallelShard, reach: int, device: torch.device
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """What context-parallel ranks send each other.

    Returns:
        Own positions to send; rows of what all ranks sent, reordered to ``[edges | clean in place order]``;
        and the edges' views and places.
    """
    empty = torch.empty(0, dtype=torch.long, device=device)
    if shard.size == 1:
        return empty, empty, (empty, empty)
    n = length // shard.size
    near = _near_ends(shard, length, reach, device)
    view = torch.arange(views, device=device)
    sent = torch.cat([views * n + torch.arange(n, device=device), (view[:, None] * n + near).flatten()])
    edge_views, edge_places, edge_rows, clean_rows = [empty], [empty], [empty], empty.new_empty(length)
    for rank in range(shard.size):
        other = ContextParallelShard(rank, shard.size)
        theirs = other.places(length, device)
        first = rank * len(sent)
        clean_rows[theirs] = first + torch.arange(n, device=device)
        edge_rows.append(first + torch.arange(n, len(sent), device=device))
        their_edges = theirs[_near_ends(other, length, reach, device)]
        edge_views.append(view.repeat_interleave(len(their_edges)))
        edge_places.append(their_edges.repeat(views))
    return sent, torch.cat([*edge_rows, clean_rows]), (torch.cat(edge_views), torch.cat(edge_places))


def _near_ends(shard: ContextParallelShard, length: int, reach: int, device: torch.device) -> Tensor:
    """Which of a rank's places are within reach of another chunk's."""
    near, offset = [], 0
    for start, end in shard.runs(length):
        place = torch.arange(end - start, device=device)
        near.append(offset + place[(place < reach) | (place >= end - start - reach)])
        offset += end - start
    return torch.cat(near)


@dataclass(frozen=True)
class Group:
    """Queries that one SDPA call takes, and the keys that any of them may see."""

    queries: slice
    noisy: Tensor | None
    """Positions of noisy keys; None for clean queries."""
    clean: slice
    """Positions of clean keys."""
    mask: Tensor | None
    """[batch or 1, 1, queries, keys] 0 where allowed, else -inf, fp32; None for plain causal attention. (SDPA
    would make this of a boolean mask again in every layer.)"""

    def keys(self, states: Tensor) -> Tensor:
        """The group's part of keys or values [batch, heads, positions, head_dim]."""
        clean = states[:, :, self.clean]
        return clean if self.noisy is None else torch.cat([states[:, :, self.noisy], clean], dim=2)

    def add_to_keys(self, total: Tensor, part: Tensor) -> None:
        """Add what :meth:`keys` would take, back where it was taken."""
        first = 0
        if self.noisy is not None:
            first = len(self.noisy)
            total.index_add_(2, self.noisy, part[:, :, :first])
        total[:, :, self.clean] += part[:, :, first:]


class AttentionPlan:
    """The queries and keys of one rank in one micro-batch, and what each query may see.

    Queries are this rank's positions, ``[noisy views | clean]``.  Keys are its noisy positions, then what
    the other ranks sent: noisy places near the ends of chunks, where blocks reach across them, and the
    clean places of the whole sample in order.

    Args:
        views: Noisy views.
        blocks: [L], or [batch, L] where rows differ: number of each place's block.
        documents: The same shape: number of each place's document.
        block_causal: What a clean place sees; see :func:`~nemodiff_train.objective.rule.can_attend`.
        share: The rank.
        reach: Positions by which a block may extend beyond a chunk or a group of queries; 0 where both hold
            whole blocks.
        group: Queries that one SDPA call takes.
    """

    def __init__(
        self,
        views: int,
        blocks: Tensor,
        documents: Tensor,
        block_causal: bool,
        shard: ContextParallelShard,
        reach: int,
        group: int,
    ) -> None:
        self.views, self.block_causal, self.shard, self.reach = views, block_causal, shard, reach
        self.length, self.device = blocks.shape[-1], blocks.device
        self.arrangement = _arrangement(views, self.length, shard, reach, blocks.device)
        self.own_places = len(self.arrangement.queries[1]) // (views + 1)
        self.sent, self.received = self.arrangement.sent, self.arrangement.received
        self.queries, self.keys = (
            Positions(view, place, blocks[..., place], documents[..., place])
            for view, place in (self.arrangement.queries, self.arrangement.keys)
        )
        self.first_clean = len(self.keys.view) - self.length
        self.group = group
        self._block_masks: dict[tuple[int, int], BlockMask] = {}

    @property
    def causal(self) -> bool:
        """Whether all of it is ordinary causal attention."""
        return not self.views and self._plain(0)

    @functools.cached_property
    def groups(self) -> list[Group]:
        """The calls of SDPA that together visit little more than the allowed pairs."""
        found = []
        for segment in range(self.views + 1):
            offset = segment * self.own_places
            for start, end in self.shard.runs(self.length):
                step = end if self._plain(segment) else self.group
                for first in range(start, end, step):
                    last = min(first + step, end)
                    queries = slice(offset + first - start, offset + last - start)
                    found.append(self._group(segment, first, last, queries))
                offset += end - start
        return found

    def _plain(self, segment: int) -> bool:
        """Whether a segment is the ordinary causal attention that needs no mask."""
        one_document = self.keys.document.dim() == 1
        return segment == self.views and self.shard.size == 1 and one_document and not self.block_causal

    def _group(self, segment: int, first: int, last: int, queries: slice) -> Group:
        if self._plain(segment):
            return Group(queries, None, slice(self.first_clean, self.first_clean + last), None)
        noisy = None
        visible = last
        if segment < self.views:
            near = (self.keys.position >= first - self.reach) & (self.keys.position < last + self.reach)
            noisy = ((self.keys.view == segment) & near).nonzero()[:, 0]
        elif self.block_causal:
            visible = min(last + self.reach, self.length)
        clean = slice(self.first_clean, self.first_clean + visible)
        index = torch.arange(self.first_clean, clean.stop, device=self.device)
        keys = self.keys.at(index if noisy is None else torch.cat([noisy, index]))
        own = torch.arange(queries.start, queries.stop, device=self.device)
        mask = can_attend(self.queries.at(own).as_queries(), keys.as_keys(), self.block_causal)
        added = torch.zeros(mask.shape, device=self.device).masked_fill(~mask, -torch.inf)
        return Group(queries, noisy, clean, added.view(-1, 1, *mask.shape[-2:]))

    def block_mask(self, tile: tuple[int, int]) -> BlockMask:
        """The same for FlexAttention.

        Args:
            tile: Queries and keys of a tile.
        """
        if tile not in self._block_masks:
            runs = _runs(self.arrangement, tile)
            self._block_masks[tile] = block_mask(self.queries, self.keys, self.block_causal, *runs, tile)
        return self._block_masks[tile]


@functools.lru_cache(maxsize=16)
def uniform_plan(
    views: int, length: int, block_size: int, block_causal: bool, shard: ContextParallelShard, device: torch.device
) -> AttentionPlan:
    """The plan of samples that are one document with a fixed grid of blocks."""
    blocks = torch.arange(length, device=device) // block_size
    chunk = length // (2 * shard.size) if shard.size > 1 else length
    reach = 0 if chunk % block_size == 0 else block_size - 1
    group = max(block_size, QUERY_GROUP // block_size * block_size)
    return AttentionPlan(views, blocks, torch.zeros_like(blocks), block_causal, shard, reach, group)


def segmented_plan(
    views: int, segment_ids: Tensor, block_causal: bool, largest_block: int, shard: ContextParallelShard
) -> AttentionPlan:
    """The plan of samples with documents, or with blocks of changing size.

    Args:
        segment_ids: [batch, 3, L] document, block and position of each place.
        largest_block: Most places of a block.
    """
    documents, blocks = segment_ids[:, 0], segment_ids[:, 1]
    return AttentionPlan(views, blocks, documents, block_causal, shard, largest_block - 1, QUERY_GROUP)


def shard_of(group: Any) -> ContextParallelShard:
    """The share of this process in a context-parallel process group."""
    return ContextParallelShard(group.rank(), group.size())
