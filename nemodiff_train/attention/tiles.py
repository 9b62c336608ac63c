"""FlexAttention's block mask, made from segments of positions instead of from all pairs of positions.

FlexAttention computes attention one tile of queries x keys at a time, and has to be told which tiles hold an allowed
pair and which hold nothing else. A segment is a run of consecutive positions of one view within one tile. Along a
segment blocks, documents and positions never decrease, so their minimum and maximum tell whether some or all of its
queries may see a segment of keys. That takes time and memory per pair of segments, of which there are thousands of
times fewer than pairs of positions.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from nemodiff_train.objective.rule import CLEAN, Positions, can_attend


class Interval(NamedTuple):
    """The minimum and the maximum of each segment's values, [rows, segments] each.

    Comparing the highest query with the lowest key tells whether any pair fulfils a condition. With both intervals
    swapped the lowest query is compared with the highest key, which tells whether all pairs do.
    """

    low: Tensor
    high: Tensor

    def swapped(self) -> "Interval":
        """Exchange minimum and maximum, to turn ``any`` into ``all`` below."""
        return Interval(self.high, self.low)

    def any_ge(self, other: "Interval") -> Tensor:
        """Return whether any value is at or above any of ``other``: [rows, segments, segments of other]."""
        return self.high[:, :, None] >= other.low[:, None, :]

    def any_gt(self, other: "Interval") -> Tensor:
        """Return whether any value is above any of ``other``: [rows, segments, segments of other]."""
        return self.high[:, :, None] > other.low[:, None, :]

    def overlaps(self, other: "Interval") -> Tensor:
        """Return whether the intervals overlap, as they must if any values are equal: same shape.

        Swapped, whether all values are equal.
        """
        return self.any_ge(other) & other.any_ge(self).mT


@dataclass(frozen=True)
class Segments:
    """Positions cut where the view changes, where consecutive positions do not follow each other, and at tiles."""

    segment: Tensor
    """[positions] segment of each position."""
    view: Tensor
    """[segments] view of each segment."""
    tile: Tensor
    """[segments] tile of each segment."""
    per_tile: Tensor
    """[tiles] number of segments in each tile."""
    full_tile: Tensor
    """[tiles] whether a tile has all its positions; the last one may not."""

    @classmethod
    def cut(cls, view: Tensor, position: Tensor, tile_size: int) -> "Segments":
        """Cut a sequence of queries or keys.

        Args:
            view: [positions] view of each.
            position: [positions] position of each in its view.
            tile_size: Positions per tile.
        """
        index = torch.arange(len(view), device=view.device)
        starts = index % tile_size == 0
        starts[1:] |= (view.diff() != 0) | (position.diff() != 1)
        first = starts.nonzero()[:, 0]  # [segments] index of each segment's first position
        tile = first // tile_size
        per_tile = torch.bincount(tile)
        full_tile = (torch.arange(len(per_tile), device=view.device) + 1) * tile_size <= len(view)
        return cls(starts.cumsum(0) - 1, view[first], tile, per_tile, full_tile)

    def interval(self, values: Tensor) -> Interval:
        """Reduce [positions] or [rows, positions] to the interval of each segment."""
        values = values.view(-1, len(self.segment))
        segment, empty = self.segment.expand_as(values), values.new_zeros(len(values), len(self.view))
        return Interval(
            empty.scatter_reduce(1, segment, values, "amin", include_self=False),
            empty.scatter_reduce(1, segment, values, "amax", include_self=False),
        )


class _Bounds(NamedTuple):
    """View of some segments, and their intervals of position, block and document; see ``Positions``."""

    view: Tensor
    position: Interval
    block: Interval
    document: Interval

    def swapped(self) -> "_Bounds":
        return _Bounds(self.view, self.position.swapped(), self.block.swapped(), self.document.swapped())


def block_mask(
    queries: Positions,
    keys: Positions,
    rule: tuple[bool, bool],
    query_segments: Segments,
    key_segments: Segments,
    tile: tuple[int, int],
) -> BlockMask:
    """Make what :func:`torch.nn.attention.flex_attention.create_block_mask` makes of the rule.

    Tiles that it leaves out hold no allowed pair, and tiles that it calls full no other. Where documents meet, it may
    keep a tile that holds none.

    Args:
        queries: Positions whose ``block`` and ``document`` are [positions] or [rows, positions].
        keys: Likewise.
        rule: ``block_causal`` and ``causal_noise`` of :func:`~nemodiff_train.objective.rule.can_attend`.
        query_segments: The queries, cut by ``tile[0]``.
        key_segments: The keys, cut by ``tile[1]``.
        tile: Number of queries and of keys per tile.
    """
    query = _Bounds(
        query_segments.view, *map(query_segments.interval, (queries.position, queries.block, queries.seen_document()))
    )
    # The document of a padding key is no query's: a segment with such keys is never allowed in full, and one of
    # nothing else never at all.
    key = _Bounds(key_segments.view, *map(key_segments.interval, (keys.position, keys.block, keys.document)))
    # [rows, query tiles, key tiles] number of pairs of segments with any allowed pair, and with no other.
    some = _count_by_tile(_allowed(query, key, *rule), query_segments, key_segments)
    full = _count_by_tile(_allowed(query.swapped(), key.swapped(), *rule), query_segments, key_segments)
    # The same shape: whether any pair of a tile is allowed, and whether all are.
    complete = query_segments.full_tile[:, None] & key_segments.full_tile
    any_allowed = some > 0
    all_allowed = complete & (full == query_segments.per_tile[:, None] * key_segments.per_tile)

    # In tiles that are not full FlexAttention evaluates the rule for every pair: it reads these, hence in 32 bits.
    queries, keys = (Positions(*(values.int() for values in positions)) for positions in (queries, keys))

    def mask_mod(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return can_attend(_pick(queries, batch, query), _pick(keys, batch, key), *rule)

    lists = *_kv_blocks(any_allowed & ~all_allowed), *_kv_blocks(all_allowed)
    lengths = len(query_segments.segment), len(key_segments.segment)
    return BlockMask.from_kv_blocks(*lists, tile, mask_mod, lengths)


def _allowed(query: _Bounds, key: _Bounds, block_causal: bool, causal_noise: bool) -> Tensor:
    """State :func:`~nemodiff_train.objective.rule.can_attend` for segments: [rows, query segments, key segments]."""
    before = query.block.any_ge(key.block) if block_causal else query.position.any_ge(key.position)
    visible_text = torch.where((query.view == CLEAN)[:, None], before, query.block.any_gt(key.block))
    same_block = (query.view[:, None] == key.view) & query.block.overlaps(key.block)
    if causal_noise:
        same_block = same_block & query.position.any_ge(key.position)
    return torch.where(key.view == CLEAN, visible_text & query.document.overlaps(key.document), same_block)


def _count_by_tile(pairs: Tensor, query_segments: Segments, key_segments: Segments) -> Tensor:
    """Count the true pairs of segments in each tile: [rows, query tiles, key tiles] int32."""
    rows, _, keys = pairs.shape
    tiles = len(query_segments.per_tile), len(key_segments.per_tile)
    counts = torch.zeros(rows, tiles[0], keys, dtype=torch.int32, device=pairs.device)
    counts.index_add_(1, query_segments.tile, pairs.int())
    return counts.new_zeros(rows, *tiles).index_add_(2, key_segments.tile, counts)


def _kv_blocks(tiles: Tensor) -> tuple[Tensor, Tensor]:
    """Turn a table of tiles into FlexAttention's lists.

    Args:
        tiles: [rows, query tiles, key tiles] boolean.

    Returns:
        [rows, 1, query tiles] int32 number of true key tiles, and [rows, 1, query tiles, key tiles] int32 indices of
        all key tiles, the true ones first.
    """
    selected = tiles[:, None].int()
    return selected.sum(-1, dtype=torch.int32), selected.argsort(dim=-1, descending=True, stable=True).int()


def _pick(positions: Positions, batch: Tensor, index: Tensor) -> Positions:
    return Positions(*(values[index] if values.dim() == 1 else values[batch, index] for values in positions))
