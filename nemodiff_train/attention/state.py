"""What the attention modules of one model share during a forward pass."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


class KeyValueCache:
    """Keys and values of the committed tokens, allocated once and cropped by moving a length.

    A forward writes its own keys and values behind the committed ones.  Whether they stay is decided
    afterwards, by advancing ``lengths`` or not: a draft leaves nothing behind, and a verified prefix
    is kept by advancing over it.

    Args:
        rows: Sequences decoded together.
        capacity: Most positions a row may reach, the draft included.
    """

    def __init__(self, rows: int, capacity: int, device: torch.device | str) -> None:
        self.rows = rows
        self.capacity = capacity
        self.lengths = torch.zeros(rows, dtype=torch.long, device=device)
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    def layer(self, number: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of one layer, each [rows, kv_heads, capacity, head_dim].

        Args:
            number: Megatron's layer number.
            like: [batch, kv_heads, positions, head_dim]; gives the shape, dtype and device.
        """
        if number not in self._layers:
            shape = (self.rows, like.shape[1], self.capacity, like.shape[3])
            self._layers[number] = (like.new_zeros(shape), like.new_zeros(shape))
        return self._layers[number]


@dataclass(frozen=True)
class CachedPass:
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

    @classmethod
    def make(cls, cache: KeyValueCache, rows: Tensor, new: int, causal: bool) -> "CachedPass":
        """Lay ``new`` tokens behind each row's committed ones.

        Args:
            causal: Each new token sees the committed ones and those up to itself; otherwise all new
                tokens see each other (a block forward).
        """
        starts = cache.lengths[rows]
        step = torch.arange(new, device=starts.device)
        positions = starts[:, None] + step
        visible = int(starts.max()) + new
        uniform = bool((starts == starts[0]).all())
        if uniform and (new == 1 or not causal):
            return cls(cache, rows, positions, visible, None)
        last_seen = positions if causal else positions[:, -1:].expand_as(positions)
        mask = torch.arange(visible, device=starts.device) <= last_seen[:, None, :, None]
        return cls(cache, rows, positions, visible, mask)

    def extend(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Write the new keys and values behind the cached ones and return all that is visible.

        Args:
            key: [batch, kv_heads, new, head_dim]; ``value`` likewise.

        Returns:
            Keys and values, each [batch, kv_heads, visible, head_dim].
        """
        keys, values = self.cache.layer(layer, key)
        rows = self.rows[:, None]
        keys[rows, :, self.positions] = key.transpose(1, 2)
        values[rows, :, self.positions] = value.transpose(1, 2)
        if len(self.rows) == self.cache.rows:
            return keys[:, :, : self.visible], values[:, :, : self.visible]
        return keys[self.rows, :, : self.visible], values[self.rows, :, : self.visible]


@dataclass
class AttentionState:
    """Shared by every attention module and the rotary embedding of one model.

    Training needs nothing from it: the layout of a training sample follows from the configuration.
    Decoding sets ``cached`` for the length of one forward.
    """

    cached: CachedPass | None = None
    tables: dict[int, Any] = field(default_factory=dict)
    """Rotary angles by number of places, as the model's own embedding returns them."""

    def training_positions(self, positions: int, joint: bool, device: torch.device | str) -> Tensor:
        """Place in the text of every position of a training sample: [positions], 0 .. L-1 per half."""
        place = torch.arange(positions, device=device)
        return place % (positions // 2) if joint else place
