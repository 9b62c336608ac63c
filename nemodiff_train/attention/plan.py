"""Who attends to whom in a training pass: the rule laid out for one rank, the same for all layers."""

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nemodiff_train.objective.rule import Places, may_attend, places

# Queries that one SDPA call takes at a time: enough to keep the call busy, few enough that little of
# its mask is empty.
QUERY_GROUP = 128

NOBODY = -2
"""The ``view`` of received keys that this rank has already."""


@dataclass(frozen=True)
class Share:
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


class Plan:
    """The queries and keys of one rank in one micro-batch, and what each query may see.

    Queries are this rank's positions, ``[noisy views | clean]``.  Keys are its noisy positions, then what
    the other ranks sent: noisy places near the ends of chunks, where blocks reach across them, and the
    clean places of the whole sample in order.

    Args:
        views: Noisy views.
        blocks: [L], or [batch, L] where rows differ: number of each place's block.
        documents: The same shape: number of each place's document.
        block_causal: What a clean place sees; see :func:`~nemodiff_train.objective.rule.may_attend`.
        share: The rank.
        reach: Places by which a block may extend beyond a chunk or a group of queries; 0 where both hold
            whole blocks.
        group: Queries that one SDPA call takes.
    """

    def __init__(
        self, views: int, blocks: Tensor, documents: Tensor, block_causal: bool, share: Share, reach: int, group: int
    ) -> None:
        self.views, self.block_causal, self.share, self.reach = views, block_causal, share, reach
        self.length, self.device = blocks.shape[-1], blocks.device
        everything = places(views, blocks, documents)
        mine = share.places(self.length, self.device)
        self.own_places = len(mine)
        own = torch.cat([segment * self.length + mine for segment in range(views + 1)])
        noisy = own[: views * len(mine)]
        clean = views * self.length + torch.arange(self.length, device=self.device)
        self.sent, self.received, edges = self._exchange()
        self.queries = everything.at(own)
        self.keys = everything.at(torch.cat([noisy, edges, clean]))
        self.keys.view[len(noisy) : len(noisy) + len(edges)][torch.isin(edges, noisy)] = NOBODY
        self.first_clean = len(noisy) + len(edges)
        self.group = group

    def _exchange(self) -> tuple[Tensor, Tensor, Tensor]:
        """What context-parallel ranks send each other.

        Returns:
            Own positions to send; rows of what all ranks sent, reordered to ``[edges | clean in place order]``;
            and the edges' positions in the whole sample.
        """
        n, empty = self.own_places, torch.empty(0, dtype=torch.long, device=self.device)
        if self.share.size == 1:
            return empty, empty, empty
        near = self._near_ends(self.share)
        offsets = torch.arange(self.views, device=self.device)[:, None]
        sent = torch.cat([self.views * n + torch.arange(n, device=self.device), (offsets * n + near).flatten()])
        edges, edge_rows, clean_rows = [empty], [empty], empty.new_empty(self.length)
        for rank in range(self.share.size):
            other = Share(rank, self.share.size)
            theirs = other.places(self.length, self.device)
            first = rank * len(sent)
            clean_rows[theirs] = first + torch.arange(n, device=self.device)
            edge_rows.append(first + torch.arange(n, len(sent), device=self.device))
            edges.append((offsets * self.length + theirs[self._near_ends(other)]).flatten())
        return sent, torch.cat([*edge_rows, clean_rows]), torch.cat(edges)

    def _near_ends(self, share: Share) -> Tensor:
        """Which of a rank's places are within reach of another chunk's."""
        near, offset = [], 0
        for start, end in share.runs(self.length):
            place = torch.arange(end - start, device=self.device)
            near.append(offset + place[(place < self.reach) | (place >= end - start - self.reach)])
            offset += end - start
        return torch.cat(near)

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
            for start, end in self.share.runs(self.length):
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
        return segment == self.views and self.share.size == 1 and one_document and not self.block_causal

    def _group(self, segment: int, first: int, last: int, queries: slice) -> Group:
        if self._plain(segment):
            return Group(queries, None, slice(self.first_clean, self.first_clean + last), None)
        noisy = None
        visible = last
        if segment < self.views:
            near = (self.keys.place >= first - self.reach) & (self.keys.place < last + self.reach)
            while near.dim() > 1:
                near = near[0]
            noisy = ((self.keys.view == segment) & near).nonzero()[:, 0]
        elif self.block_causal:
            visible = min(last + self.reach, self.length)
        clean = slice(self.first_clean, self.first_clean + visible)
        index = torch.arange(self.first_clean, clean.stop, device=self.device)
        keys = self.keys.at(index if noisy is None else torch.cat([noisy, index]))
        own = torch.arange(queries.start, queries.stop, device=self.device)
        mask = may_attend(self.queries.at(own).as_queries(), keys.as_keys(), self.block_causal)
        added = torch.zeros(mask.shape, device=self.device).masked_fill(~mask, -torch.inf)
        return Group(queries, noisy, clean, added.view(-1, 1, *mask.shape[-2:]))

    @functools.cached_property
    def block_mask(self) -> Any:
        """The same for FlexAttention."""
        from torch.nn.attention.flex_attention import create_block_mask

        def rule(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return may_attend(_pick(self.queries, batch, query), _pick(self.keys, batch, key), self.block_causal)

        documents = self.keys.document
        rows = None if documents.dim() == 1 else len(documents)
        queries, keys = len(self.queries.view), len(self.keys.view)
        return create_block_mask(rule, B=rows, H=None, Q_LEN=queries, KV_LEN=keys, device=str(self.device))


def _pick(positions: Places, batch: Tensor, index: Tensor) -> Places:
    return Places(*(each[index] if each.dim() == 1 else each[batch, index] for each in positions))


@functools.lru_cache(maxsize=16)
def regular_plan(
    views: int, length: int, block_size: int, block_causal: bool, share: Share, device: torch.device
) -> Plan:
    """The plan of samples that are one document with a fixed grid of blocks."""
    blocks = torch.arange(length, device=device) // block_size
    chunk = length // (2 * share.size) if share.size > 1 else length
    reach = 0 if chunk % block_size == 0 else block_size - 1
    group = max(block_size, QUERY_GROUP // block_size * block_size)
    return Plan(views, blocks, torch.zeros_like(blocks), block_causal, share, reach, group)


def irregular_plan(views: int, structure: Tensor, block_causal: bool, largest_block: int, share: Share) -> Plan:
    """The plan of samples with documents, or with blocks of changing size.

    Args:
        structure: [batch, 3, L] document, block and position of each place.
        largest_block: Most places of a block.
    """
    documents, blocks = structure[:, 0], structure[:, 1]
    return Plan(views, blocks, documents, block_causal, share, largest_block - 1, QUERY_GROUP)


def share_of(group: Any) -> Share:
    """The share of this process in a context-parallel process group."""
    return Share(group.rank(), group.size())
