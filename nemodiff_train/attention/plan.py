"""Who attends to whom in a training pass: the rule laid out for one rank, the same for all layers."""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from nemodiff_train.attention.context_parallel import ContextParallelShard, KeyQueryLayout, key_query_layout
from nemodiff_train.attention.tiles import Segments, block_mask
from nemodiff_train.objective.rule import CLEAN, Positions, can_attend

QUERY_TILE = 128
"""Queries per SDPA call: enough to keep the call busy, few enough that little of its mask is empty."""


@dataclass(frozen=True)
class QueryTile:
    """Consecutive queries that one SDPA call takes, and the keys that any of them may see."""

    queries: slice
    """Indices of the queries."""
    noisy_keys: Tensor | None
    """[noisy] indices of the noisy keys; None for clean queries."""
    clean_keys: slice
    """Indices of the clean keys."""
    mask: Tensor | None
    """[batch or 1, 1, queries, keys] fp32, added to the scores: 0 where allowed, else -inf; None for plain causal
    attention. (SDPA would convert a boolean mask to this in every layer.)"""

    def take_keys(self, states: Tensor) -> Tensor:
        """Take the tile's ``[noisy | clean]`` keys or values from [batch, heads, keys, head_dim]."""
        clean = states[:, :, self.clean_keys]
        return clean if self.noisy_keys is None else torch.cat([states[:, :, self.noisy_keys], clean], dim=2)

    def add_to_keys(self, total: Tensor, part: Tensor) -> None:
        """Add ``part``, in the order of :meth:`take_keys`, to where its keys are in ``total``, in place."""
        noisy = 0
        if self.noisy_keys is not None:
            noisy = len(self.noisy_keys)
            total.index_add_(2, self.noisy_keys, part[:, :, :noisy])
        total[:, :, self.clean_keys] += part[:, :, noisy:]


class AttentionPlan:
    """The queries and keys of one rank in one micro-batch, and what each query may see.

    Their order is that of :class:`~nemodiff_train.attention.context_parallel.KeyQueryLayout`.

    Args:
        views: Noisy views.
        blocks: [L], or [batch, L] where rows differ: block of each position.
        documents: The same shape: document of each position.
        block_causal: What a clean position sees; see :func:`~nemodiff_train.objective.rule.can_attend`.
        shard: The rank.
        halo: Number of positions by which a block may extend beyond a chunk or a query tile; 0 where both hold whole
            blocks.
        tile_size: Maximum number of queries per query tile.
        causal_noise: What a noisy position sees of its block; see the same.
    """

    def __init__(
        self,
        views: int,
        blocks: Tensor,
        documents: Tensor,
        block_causal: bool,
        shard: ContextParallelShard,
        halo: int,
        tile_size: int,
        causal_noise: bool,
    ) -> None:
        self.views, self.block_causal, self.causal_noise, self.shard = views, block_causal, causal_noise, shard
        self.halo, self.tile_size = halo, tile_size
        self.length, self.device = blocks.shape[-1], blocks.device
        self.layout = key_query_layout(views, self.length, shard, halo, self.device)
        self.queries, self.keys = (
            Positions(view, position, blocks[..., position], documents[..., position])
            for view, position in (
                (self.layout.query_view, self.layout.query_position),
                (self.layout.key_view, self.layout.key_position),
            )
        )
        self._first_clean_key = len(self.keys.view) - self.length
        # Whether clean queries attend as in ordinary causal attention, which needs no mask.
        self._clean_is_plain = shard.size == 1 and documents.dim() == 1 and not block_causal
        self._block_masks: dict[tuple[int, int], BlockMask] = {}

    @property
    def causal(self) -> bool:
        """Whether all of it is ordinary causal attention."""
        return not self.views and self._clean_is_plain

    @functools.cached_property
    def query_tiles(self) -> list[QueryTile]:
        """Tiles that cover all queries in order, and together visit little more than the allowed pairs."""
        tiles, index = [], 0
        for view in (*range(self.views), CLEAN):
            for first, end in self.shard.chunks(self.length):
                size = end if view == CLEAN and self._clean_is_plain else self.tile_size
                for position in range(first, end, size):
                    tile_end = min(position + size, end)
                    queries = slice(index, index + tile_end - position)
                    tiles.append(self._query_tile(view, position, tile_end, queries))
                    index = queries.stop
        return tiles

    def _query_tile(self, view: int, first: int, end: int, queries: slice) -> QueryTile:
        """Make the tile of the ``queries`` of one view at positions ``first`` to ``end`` - 1."""
        if view == CLEAN and self._clean_is_plain:
            return QueryTile(queries, None, slice(self._first_clean_key, self._first_clean_key + end), None)
        # Noisy queries see their own blocks, which may extend beyond the tile by the halo, and the clean keys before
        # them; clean queries see the clean keys up to themselves, or up to the end of their block.
        noisy_keys, visible = None, end
        if view != CLEAN:
            near = (self.layout.key_position >= first - self.halo) & (self.layout.key_position < end + self.halo)
            noisy_keys = ((self.layout.key_view == view) & near).nonzero()[:, 0]
        elif self.block_causal:
            visible = min(end + self.halo, self.length)
        clean_keys = slice(self._first_clean_key, self._first_clean_key + visible)
        # The rule for these pairs, as an additive mask: [batch or 1, 1, queries, keys].
        key_index = torch.arange(clean_keys.start, clean_keys.stop, device=self.device)
        keys = self.keys.at(key_index if noisy_keys is None else torch.cat([noisy_keys, key_index]))
        query_index = torch.arange(queries.start, queries.stop, device=self.device)
        queries_here = self.queries.at(query_index).as_queries()
        allowed = can_attend(queries_here, keys.as_keys(), self.block_causal, self.causal_noise)
        mask = torch.zeros(allowed.shape, device=self.device).masked_fill(~allowed, -torch.inf)
        return QueryTile(queries, noisy_keys, clean_keys, mask.view(-1, 1, *mask.shape[-2:]))

    def block_mask(self, tile: tuple[int, int]) -> BlockMask:
        """Return the plan as FlexAttention takes it.

        Args:
            tile: Number of queries and of keys per tile.
        """
        if tile not in self._block_masks:
            rule = self.block_causal, self.causal_noise
            self._block_masks[tile] = block_mask(self.queries, self.keys, rule, *_cut(self.layout, tile), tile)
        return self._block_masks[tile]


@functools.lru_cache(maxsize=16)
def _cut(layout: KeyQueryLayout, tile: tuple[int, int]) -> tuple[Segments, Segments]:
    """Cut the queries and the keys of a layout for FlexAttention's tiles."""
    return (
        Segments.cut(layout.query_view, layout.query_position, tile[0]),
        Segments.cut(layout.key_view, layout.key_position, tile[1]),
    )


@functools.lru_cache(maxsize=16)
def uniform_plan(
    views: int,
    length: int,
    block_size: int,
    block_causal: bool,
    shard: ContextParallelShard,
    device: torch.device,
    causal_noise: bool,
) -> AttentionPlan:
    """Return the plan of samples that are one document, cut into blocks of one size.

    Args:
        views: Noisy views.
        length: Clean tokens of a sample, L.
        block_size: Positions per block.
        block_causal: What a clean position sees; see :func:`~nemodiff_train.objective.rule.can_attend`.
        shard: The rank.
        device: Where the plan is needed.
        causal_noise: What a noisy position sees of its block; see the same.
    """
    blocks = torch.arange(length, device=device) // block_size
    chunk = length // (2 * shard.size) if shard.size > 1 else length
    halo = 0 if chunk % block_size == 0 else block_size - 1
    tile_size = max(block_size, QUERY_TILE // block_size * block_size)
    return AttentionPlan(views, blocks, torch.zeros_like(blocks), block_causal, shard, halo, tile_size, causal_noise)


def segmented_plan(
    views: int,
    segment_ids: Tensor,
    block_causal: bool,
    largest_block: int,
    shard: ContextParallelShard,
    causal_noise: bool,
) -> AttentionPlan:
    """Return the plan of samples with documents, or with blocks of changing size.

    Args:
        views: Noisy views.
        segment_ids: [batch, 3, L] document, block and position.
        block_causal: What a clean position sees; see :func:`~nemodiff_train.objective.rule.can_attend`.
        largest_block: Maximum number of positions per block.
        shard: The rank.
        causal_noise: What a noisy position sees of its block; see the same.
    """
    documents, blocks = segment_ids[:, 0], segment_ids[:, 1]
    halo = largest_block - 1
    return AttentionPlan(views, blocks, documents, block_causal, shard, halo, QUERY_TILE, causal_noise)
