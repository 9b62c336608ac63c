"""What the attention modules of one model share during a forward pass."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from nemodiff_train.attention.plan import AttentionPlan, ContextParallelShard, segmented_plan, uniform_plan

# More than a pipeline rank has micro-batches in flight at most layouts; a plan that is missing is made again.
PLANS_KEPT = 16


class KeyValueCache:
    """Keys and values of the committed tokens, allocated once and cropped by moving a length.

    A forward writes its own keys and values behind the committed ones.  Whether they stay is decided
    afterwards, by advancing ``lengths`` or not: a draft leaves nothing behind, and a verified prefix
    is kept by advancing over it.

    Args:
        layers: Layers on this process.
        rows: Sequences decoded together.
        capacity: Most positions a row may reach, the draft included.
    """

    def __init__(self, layers: int, rows: int, capacity: int, device: torch.device | str) -> None:
        self.layers = layers
        self.rows = rows
        self.capacity = capacity
        self.lengths = torch.zeros(rows, dtype=torch.long, device=device)
        self._held: Tensor | None = None  # one piece, so that nothing small is left between its parts
        self._places: dict[int, int] = {}

    def layer(self, number: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of one layer, each [rows, kv_heads, capacity, head_dim].

        Args:
            number: Megatron's layer number.
            like: [batch, kv_heads, positions, head_dim]; gives the shape, dtype and device.
        """
        if self._held is None:
            self._held = like.new_zeros(self.layers, 2, self.rows, like.shape[1], self.capacity, like.shape[3])
        keys, values = self._held[self._places.setdefault(number, len(self._places))]
        return keys, values


@dataclass(frozen=True)
class DecodeBatch:
    """One forward over new tokens behind a cache; the same for every layer, so made once.

    ``mask`` is None where every cached and new position is visible to every query.
    """

    cache: KeyValueCache
    rows: Tensor
    """[batch] row of the cache that each sequence of this pass belongs to."""
    positions: Tensor
    """[batch, new] position of every new token."""
    visible: int
    """Cache positions any query of this pass may see."""
    mask: Tensor | None
    """[batch, 1, new, visible] True where attention is allowed."""
    slots: Tensor
    """[batch, new] where in the cache each new token goes; its position, unless several share one."""
    drafts: bool = False
    """Whether the new tokens are a draft: whether a drafter's adapters act."""

    @classmethod
    def make(cls, cache: KeyValueCache, rows: Tensor, new: int, reach: int) -> "DecodeBatch":
        """Lay ``new`` tokens behind each row's committed ones.

        Args:
            reach: Each new token sees the committed ones and the new ones up to the end of its group of this
                many, counted from the first new one: 1 for a causal forward, ``new`` for one block.
        """
        starts = cache.lengths[rows]
        step = torch.arange(new, device=starts.device)
        positions = starts[:, None] + step
        visible = int(starts.max()) + new
        last_seen = positions if reach == 1 else starts[:, None] + (step // reach + 1) * reach - 1
        if bool((last_seen >= visible - 1).all()):
            return cls(cache, rows, positions, visible, None, positions)
        mask = torch.arange(visible, device=starts.device) <= last_seen[:, None, :, None]
        return cls(cache, rows, positions, visible, mask, positions)

    @classmethod
    def laid_out(cls, cache: KeyValueCache, rows: Tensor, offsets: Tensor, sees: Tensor) -> "DecodeBatch":
        """Lay new tokens behind each row's committed ones, with positions and a mask of their own.

        Args:
            offsets: [batch or 1, new] position of each new token, from the first one behind the committed.
            sees: [batch or 1, new, new] which new tokens each of them sees; all see the committed ones.
        """
        starts = cache.lengths[rows]
        new = sees.shape[-1]
        visible = int(starts.max()) + new
        key = torch.arange(visible, device=starts.device) - starts[:, None]  # which new token; below 0 is committed
        index = key.clamp(0, new - 1)[:, None, :].expand(-1, new, -1)
        mask = (key < 0)[:, None, :] | (sees.expand(len(rows), -1, -1).gather(2, index) & (key < new)[:, None, :])
        slots = starts[:, None] + torch.arange(new, device=starts.device)
        return cls(cache, rows, starts[:, None] + offsets, visible, mask[:, None], slots)

    def extend(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Write the new keys and values behind the cached ones and return all that is visible.

        Args:
            key: [batch, kv_heads, new, head_dim]; ``value`` likewise.

        Returns:
            Keys and values, each [batch, kv_heads, visible, head_dim].
        """
        keys, values = self.cache.layer(layer, key)
        rows = self.rows[:, None]
        keys[rows, :, self.slots] = key.transpose(1, 2)
        values[rows, :, self.slots] = value.transpose(1, 2)
        if len(self.rows) == self.cache.rows:
            return keys[:, :, : self.visible], values[:, :, : self.visible]
        return keys[self.rows, :, : self.visible], values[self.rows, :, : self.visible]


@dataclass
class AttentionState:
    """Shared by every attention module and the rotary embedding of one model.

    Decoding sets ``cached`` for the length of one forward.  In training nothing changes from one
    micro-batch to the next but ``segment_ids``, which travels as Megatron's attention mask instead:
    recomputation and pipelining run layers of one micro-batch between those of another.
    """

    decode_batch: DecodeBatch | None = None
    shard: ContextParallelShard = field(default_factory=ContextParallelShard)
    """This process's part of the sequence under context parallelism."""
    context_group: Any = None
    """The process group of context parallelism."""
    tables: dict[int, Any] = field(default_factory=dict)
    """Rotary angles by number of places, as the model's own embedding returns them."""
    rotary_segment_ids: Tensor | None = None
    """The ``segment_ids`` of the micro-batch that is about to run forward, for the rotary embedding."""
    plans: dict[tuple[int, ...], tuple[Tensor, AttentionPlan]] = field(default_factory=dict)
    """Plans of the last few micro-batches, by the address of their segment_ids."""

    def drafted(self, positions: int, views: int) -> int:
        """How many of a forward's positions, from the first one, are drafts: the noisy views, or a draft pass."""
        if self.decode_batch is None:
            return positions * views // (views + 1)
        return positions if self.decode_batch.drafts else 0

    def plan(self, config: Any, positions: int, segment_ids: Tensor | None, device: torch.device) -> AttentionPlan:
        """Who attends to whom, for queries of ``positions`` places on this rank.

        Args:
            config: The model's ``TriModeModelProvider``.
            segment_ids: [batch, 3, L] of :class:`~nemodiff_train.objective.sample.SampleMaker`, or None where
                samples are one document with a fixed grid of blocks.
        """
        views, block_causal = config.noisy_views, config.clean_attention == "block_causal" and config.noisy_views > 0
        if segment_ids is None:
            length = positions * self.shard.size // (views + 1)
            return uniform_plan(views, length, config.block_size, block_causal, self.shard, device)
        key = (segment_ids.data_ptr(), *segment_ids.shape)
        if key not in self.plans:
            while len(self.plans) >= PLANS_KEPT:
                self.plans.pop(next(iter(self.plans)))
            plan = segmented_plan(views, segment_ids, block_causal, config.largest_block, self.shard)
            self.plans[key] = (segment_ids, plan)  # holding the segment_ids keeps its address from being used again
        return self.plans[key][1]

    def positions(self, config: Any, count: int, segment_ids: Tensor | None, device: torch.device) -> Tensor:
        """Position in the text of every query of a training sample on this rank: [batch or 1, ``count``]."""
        segments = config.noisy_views + 1
        mine = self.shard.places(count * self.shard.size // segments, device)
        own = mine[None] if segment_ids is None else segment_ids[:, 2, mine].long()
        return own.repeat(1, segments)
