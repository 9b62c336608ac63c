"""Attention state of decoding: the cache of committed tokens, and one forward of new tokens after it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nemodiff_train.runtime.memory import require_memory


class KeyValueCache:
    """Keys and values of the committed tokens, allocated once and cropped by moving a length.

    A forward writes its keys and values after the committed ones. Whether they stay is decided afterwards, by
    advancing ``lengths`` or not: a draft leaves no trace, and a verified prefix is kept by advancing over it.

    Args:
        layers: Number of layers on this process.
        rows: Number of sequences decoded together.
        capacity: Maximum number of positions per row, the draft included.
        device: Where the keys and values are.
    """

    def __init__(self, layers: int, rows: int, capacity: int, device: torch.device | str) -> None:
        self.layers = layers
        self.rows = rows
        self.capacity = capacity
        self.device = torch.device(device)
        self.lengths = torch.zeros(rows, dtype=torch.long, device="cpu")
        """[rows] number of committed tokens; on the host, which lays out every forward without asking the device."""
        self._states: Tensor | None = None  # one allocation, so that no gaps are left between its parts
        self._layer_index: dict[int, int] = {}

    def to_device(self, values: Tensor) -> Tensor:
        """Move a small tensor of the host to the device of the cache, without waiting for it."""
        return values.to(self.device, non_blocking=True)

    def layer(self, number: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return the keys and values of one layer, each [rows, kv_heads, capacity, head_dim].

        Args:
            number: Megatron's layer number.
            like: [batch, kv_heads, positions, head_dim]; gives the shape, dtype and device.

        Raises:
            UserError: The memory that is free does not hold the cache.
        """
        if self._states is None:
            shape = (self.layers, 2, self.rows, like.shape[1], self.capacity, like.shape[3])
            require_memory(
                math.prod(shape) * like.element_size(),
                like.device,
                f"the cache of {self.rows} rows of {self.capacity:,} tokens",
                "decode fewer rows together, or fewer tokens",
            )
            self._states = like.new_zeros(shape)
        keys, values = self._states[self._layer_index.setdefault(number, len(self._layer_index))]
        return keys, values

    def compact(self, rows: Tensor, kept: Sequence[Tensor]) -> None:
        """Move entries together that lie after the committed tokens of rows.

        Args:
            rows: [batch] rows, on the host.
            kept: For each, the indices to keep, ascending, counted from the first one after the committed tokens.
        """
        assert self._states is not None  # what is to be kept was written by a forward
        # [entries that are kept, over all rows] row of each, and its index in the cache before and after.
        counts = torch.tensor([len(indices) for indices in kept])
        row, start = rows.repeat_interleave(counts), self.lengths[rows].repeat_interleave(counts)
        source = start + torch.cat(list(kept))
        target = start + torch.cat([torch.arange(int(count)) for count in counts])
        row, source, target = (self.to_device(indices) for indices in (row, source, target))
        self._states[:, :, row, :, target] = self._states[:, :, row, :, source]


@dataclass(frozen=True)
class DecodeBatch:
    """One forward of new tokens after a cache; the same for every layer, so made once."""

    cache: KeyValueCache
    rows: Tensor
    """[batch] row of the cache that each sequence of this forward belongs to."""
    positions: Tensor
    """[batch, new] position of each new token."""
    visible: int
    """Number of positions of the cache that any query of this forward may see."""
    mask: Tensor | None
    """[batch, 1, new, visible] True where attention is allowed; None where it is everywhere, or causal."""
    cache_indices: Tensor
    """[batch, new] index in the cache of each new token; its position, unless several share one."""
    position_end: int
    """Exclusive upper bound of the positions."""
    causal: bool = False
    """Whether attention is causal over new tokens that nothing precedes."""
    is_draft: bool = False
    """Whether the new tokens are a draft, for which a drafter's adapters act."""

    @classmethod
    def consecutive(cls, cache: KeyValueCache, rows: Tensor, new: int, block_size: int) -> "DecodeBatch":
        """Lay out new tokens one after another, with block-causal attention among them.

        Args:
            cache: The committed tokens, all of which are visible.
            rows: [batch] row of each sequence, on the host.
            new: Number of new tokens per sequence.
            block_size: New tokens per block, counted from the first one: 1 for causal attention, ``new`` for one
                bidirectional block.
        """
        starts = cache.lengths[rows]
        step = torch.arange(new, device="cpu")
        positions = starts[:, None] + step
        visible = int(starts.max()) + new
        # [batch, new] position of the last token that each new one sees.
        last_seen = positions if block_size == 1 else starts[:, None] + (step // block_size + 1) * block_size - 1
        causal, mask = block_size == 1 < new == visible, None
        if not causal and not bool((last_seen >= visible - 1).all()):
            last_seen = cache.to_device(last_seen)
            mask = torch.arange(visible, device=cache.device) <= last_seen[:, None, :, None]
        positions = cache.to_device(positions)
        return cls(cache, cache.to_device(rows), positions, visible, mask, positions, visible, causal)

    @classmethod
    def from_layout(
        cls, cache: KeyValueCache, rows: Tensor, offsets: Tensor, can_attend: Tensor, offset_end: int
    ) -> "DecodeBatch":
        """Lay out new tokens with positions and attention of their own.

        Args:
            cache: The committed tokens, all of which are visible.
            rows: [batch] row of each sequence, on the host.
            offsets: [batch or 1, new] position of each new token, counted from the first one after the committed.
            can_attend: [batch or 1, new, new] boolean: whether each new token attends to each other.
            offset_end: Exclusive upper bound of the offsets.
        """
        longest, starts = int(cache.lengths[rows].max()), cache.to_device(cache.lengths[rows])
        new = can_attend.shape[-1]
        visible = longest + new
        # [batch, visible] which new token each cache index holds: below 0 a committed one, from ``new`` on none.
        key = torch.arange(visible, device=starts.device) - starts[:, None]
        # [batch, new, visible] ``can_attend`` of these, and every committed token.
        column = key.clamp(0, new - 1)[:, None, :].expand(-1, new, -1)
        mask = (key < 0)[:, None, :] | (
            can_attend.expand(len(rows), -1, -1).gather(2, column) & (key < new)[:, None, :]
        )
        cache_indices = starts[:, None] + torch.arange(new, device=starts.device)
        positions = starts[:, None] + offsets
        return cls(
            cache, cache.to_device(rows), positions, visible, mask[:, None], cache_indices, longest + offset_end
        )

    def extend(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Write the new keys and values after the cached ones and return all that is visible.

        Args:
            layer: Megatron's layer number.
            key: [batch, kv_heads, new, head_dim].
            value: Likewise.

        Returns:
            Keys and values, each [batch, kv_heads, visible, head_dim].
        """
        # [rows, kv_heads, capacity, head_dim] of the cache, in which each new token has a row and an index.
        keys, values = self.cache.layer(layer, key)
        rows = self.rows[:, None]
        keys[rows, :, self.cache_indices] = key.transpose(1, 2)
        values[rows, :, self.cache_indices] = value.transpose(1, 2)
        if len(self.rows) == self.cache.rows:
            return keys[:, :, : self.visible], values[:, :, : self.visible]
        return keys[self.rows, :, : self.visible], values[self.rows, :, : self.visible]
