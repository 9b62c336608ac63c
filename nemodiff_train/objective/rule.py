"""The attention rule over a doubled sequence.  Every kernel is tested against this predicate."""

import torch
from torch import Tensor


def may_attend(query: Tensor, key: Tensor, length: int, block_size: int) -> Tensor:
    """Whether a query position may see a key position of ``[noisy | clean]``, 2L positions.

    ======= ======= =========================================
    query   key     allowed when
    ======= ======= =========================================
    noisy   noisy   same block
    noisy   clean   the key's block is earlier than the query's
    clean   clean   the key is at or before the query
    clean   noisy   never
    ======= ======= =========================================

    (Nemotron-Labs-Diffusion, section 2.2.)  The clean half is exactly an AR model's view, which is
    what lets the AR loss share the forward pass without leaking.

    Args:
        query: Positions 0 .. 2L-1, any integer shape.
        key: Positions 0 .. 2L-1, broadcastable with ``query``.
        length: L.
        block_size: Places per block.

    Returns:
        Boolean tensor of the broadcast shape.
    """
    query_clean, key_clean = query >= length, key >= length
    query_block, key_block = query % length // block_size, key % length // block_size
    return (
        (~query_clean & ~key_clean & (query_block == key_block))
        | (~query_clean & key_clean & (query_block > key_block))
        | (query_clean & key_clean & (query >= key))
    )


def dense_mask(length: int, block_size: int, device: torch.device | str = "cpu") -> Tensor:
    """The rule as a boolean [2L, 2L] table, True where attention is allowed."""
    place = torch.arange(2 * length, device=device)
    return may_attend(place[:, None], place[None, :], length, block_size)
