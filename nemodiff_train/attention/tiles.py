"""FlexAttention's block mask, made from the segment_ids of a plan and not by looking at its pairs.

FlexAttention computes attention a tile of queries x keys at a time, and wants to know which tiles hold an allowed
pair and which hold nothing else.  Positions are cut into runs: consecutive places of one view, within one tile.
Along a run blocks, documents and places never fall, so their smallest and largest values say what some or all of a
run's queries may see of a run of keys.  That takes work and memory for every pair of runs, of which there are
thousands of times fewer than pairs of positions.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from nemodiff_train.objective.rule import CLEAN, Positions, can_attend

_ENDS = ("amin", "amax")


@dataclass(frozen=True)
class Runs:
    """Positions cut where the view changes, where places leave a gap, and where a tile ends."""

    run: Tensor
    """[positions] number of each position's run."""
    view: Tensor
    """[runs]"""
    tile: Tensor
    """[runs] number of each run's tile."""
    of_tile: Tensor
    """[tiles] how many runs a tile has."""
    filled: Tensor
    """[tiles] whether a tile has all its positions; the last one may not."""

    @classmethod
    def of(cls, view: Tensor, place: Tensor, tile: int) -> "Runs":
        """Cut positions.

        Args:
            view: [positions]; ``place`` likewise.
            tile: Positions of a tile.
        """
        index = torch.arange(len(view), device=view.device)
        opens = index % tile == 0
        opens[1:] |= (view.diff() != 0) | (place.diff() != 1)
        first = opens.nonzero()[:, 0]
        tiles = first // tile
        of_tile = torch.bincount(tiles)
        filled = (torch.arange(len(of_tile), device=view.device) + 1) * tile <= len(view)
        return cls(opens.cumsum(0) - 1, view[first], tiles, of_tile, filled)

    def ends(self, values: Tensor) -> "Ends":
        """The smallest and largest value of each run.

        Args:
            values: [positions] or [rows, positions].
        """
        values = values.view(-1, len(self.run))
        run, shape = self.run.expand_as(values), (len(values), len(self.view))
        low, high = (
            values.new_zeros(shape).scatter_reduce_(1, run, values, how, include_self=False) for how in _ENDS
        )
        return Ends(low, high)


class Ends(NamedTuple):
    """Two values of each run, [rows, runs]: the smallest and the largest, or the other way round."""

    low: Tensor
    high: Tensor

    def turned(self) -> "Ends":
        """As :class:`_Summary` takes them where a statement has to hold of all pairs."""
        return Ends(self.high, self.low)

    def reaches(self, other: "Ends") -> Tensor:
        """Whether a value is at or above one of ``other``: [rows, runs, other's runs]."""
        return self.high[:, :, None] >= other.low[:, None, :]

    def passes(self, other: "Ends") -> Tensor:
        """Whether a value is above one of ``other``."""
        return self.high[:, :, None] > other.low[:, None, :]

    def meets(self, other: "Ends") -> Tensor:
        """Whether a value may be one of ``other``'s, and is where neither leaves a value out."""
        return self.reaches(other) & (other.reaches(self)).mT


class _Summary(NamedTuple):
    """What the rule needs to know of runs."""

    view: Tensor
    place: Ends
    block: Ends
    document: Ends

    def turned(self) -> "_Summary":
        """Smallest and largest exchanged.

        A comparison of the largest query with the smallest key says that some pair fulfils it; of the smallest query
        with the largest key, that all do.
        """
        return _Summary(self.view, self.place.turned(), self.block.turned(), self.document.turned())


def block_mask(
    queries: Positions, keys: Positions, block_causal: bool, query_runs: Runs, key_runs: Runs, tile: tuple[int, int]
) -> BlockMask:
    """What :func:`torch.nn.attention.flex_attention.create_block_mask` makes of the rule.

    Tiles that it leaves out hold no allowed pair, and those it calls full no other.  Where documents meet it may keep
    a tile that holds none.

    Args:
        queries: Positions whose ``block`` and ``document`` are [positions] or [rows, positions].
        keys: Likewise.
        block_causal: What a clean place sees; see :func:`~nemodiff_train.objective.rule.can_attend`.
        query_runs: The queries, cut by ``tile[0]``.
        key_runs: The keys, cut by ``tile[1]``.
        tile: Queries and keys of a tile.
    """
    some, every = _tiles(queries, keys, block_causal, query_runs, key_runs)
    lengths = len(query_runs.run), len(key_runs.run)
    return BlockMask.from_kv_blocks(
        *_numbers(some & ~every), *_numbers(every), tile, _rule(queries, keys, block_causal), lengths
    )


def _tiles(
    queries: Positions, keys: Positions, block_causal: bool, query_runs: Runs, key_runs: Runs
) -> tuple[Tensor, Tensor]:
    """Whether some pair of a tile is allowed, and whether every pair is: [rows, query tiles, key tiles] each."""
    own = _Summary(query_runs.view, *map(query_runs.ends, (queries.position, queries.block, queries.seen_document())))
    # Documents of padding keys are no query's: with them a run is never all allowed, and of them alone never at all.
    seen = _Summary(key_runs.view, *map(key_runs.ends, (keys.position, keys.block, keys.document)))
    some = _by_tile(_allowed(own, seen, block_causal), query_runs, key_runs)
    every = _by_tile(_allowed(own.turned(), seen.turned(), block_causal), query_runs, key_runs)
    filled = query_runs.filled[:, None] & key_runs.filled
    return some > 0, filled & (every == query_runs.of_tile[:, None] * key_runs.of_tile)


def _allowed(query: _Summary, key: _Summary, block_causal: bool) -> Tensor:
    """The rule of :func:`~nemodiff_train.objective.rule.can_attend` for runs: [rows, query runs, key runs]."""
    before = query.block.reaches(key.block) if block_causal else query.place.reaches(key.place)
    visible = torch.where((query.view == CLEAN)[:, None], before, query.block.passes(key.block))
    same_block = (query.view[:, None] == key.view) & query.block.meets(key.block)
    return torch.where(key.view == CLEAN, visible & query.document.meets(key.document), same_block)


def _by_tile(found: Tensor, query_runs: Runs, key_runs: Runs) -> Tensor:
    """How many pairs of runs in each tile: [rows, query tiles, key tiles] int32."""
    rows, tiles = len(found), (len(query_runs.of_tile), len(key_runs.of_tile))
    like = torch.empty(0, dtype=torch.int32, device=found.device)
    part = like.new_zeros(rows, tiles[0], found.shape[2]).index_add_(1, query_runs.tile, found.int())
    return like.new_zeros(rows, *tiles).index_add_(2, key_runs.tile, part)


def _numbers(tiles: Tensor) -> tuple[Tensor, Tensor]:
    """How many key tiles each query tile takes, [rows, 1, tiles], and all of them, those first, on one axis more."""
    chosen = tiles[:, None].int()
    return chosen.sum(-1, dtype=torch.int32), chosen.argsort(dim=-1, descending=True, stable=True).int()


def _rule(
    queries: Positions, keys: Positions, block_causal: bool
) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """The rule for single pairs, which FlexAttention asks in tiles that are not full."""
    # 32 bits: the kernel reads these for every pair of such a tile.
    queries, keys = (Positions(*(each.int() for each in positions)) for positions in (queries, keys))

    def rule(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return can_attend(_pick(queries, batch, query), _pick(keys, batch, key), block_causal)

    return rule


def _pick(positions: Positions, batch: Tensor, index: Tensor) -> Positions:
    return Positions(*(each[index] if each.dim() == 1 else each[batch, index] for each in positions))
