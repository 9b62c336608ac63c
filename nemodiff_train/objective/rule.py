"""The attention rule over noisy and clean positions.  Every kernel is tested against this predicate."""

from typing import NamedTuple

import torch
from torch import Tensor

CLEAN = -1
"""The ``view`` of clean positions; noisy views count from 0."""


class Positions(NamedTuple):
    """What the rule needs to know of some positions: four tensors that broadcast against each other."""

    view: Tensor
    """Which noisy view, or :data:`CLEAN`."""
    place: Tensor
    """Place in the sample, 0 .. L-1, the same in every view."""
    block: Tensor
    """Number of the block in the sample; blocks restart with a document, numbers do not."""
    document: Tensor
    """Number of the document in the sample; -1 - d for padding of document d, which sees what d sees, and whose clean
    half nothing sees."""

    def seen_document(self) -> Tensor:
        """Number of the document whose text a place sees."""
        return torch.where(self.document < 0, -1 - self.document, self.document)

    def as_queries(self) -> "Positions":
        """With a last axis to broadcast over keys."""
        return Positions(*(each[..., :, None] for each in self))

    def as_keys(self) -> "Positions":
        """With a second-to-last axis to broadcast over queries."""
        return Positions(*(each[..., None, :] for each in self))

    def at(self, index: Tensor) -> "Positions":
        """Some of the positions."""
        return Positions(*(each[..., index] for each in self))


def can_attend(query: Positions, key: Positions, block_causal: bool = False) -> Tensor:
    """Whether a query may see a key.

    ======= ======= ======================================================================
    query   key     allowed when
    ======= ======= ======================================================================
    noisy   noisy   same view and same block
    noisy   clean   same document, and the key's block is earlier than the query's
    clean   clean   same document, and the key is at or before the query; with
                    ``block_causal``, the key's block is the query's or earlier
    clean   noisy   never
    ======= ======= ======================================================================

    (Nemotron-Labs-Diffusion, section 2.2; ``block_causal``: BD3-LM, arXiv 2503.09573.)  The causal clean
    half is exactly an AR model's view, which is what lets the AR loss share the forward pass without leaking.

    Returns:
        Boolean tensor of the broadcast shape.
    """
    query_clean, key_clean = query.view == CLEAN, key.view == CLEAN
    before = query.block >= key.block if block_causal else query.place >= key.place
    same_block = (query.view == key.view) & (query.block == key.block)
    visible_text = torch.where(query_clean, before, query.block > key.block)
    return torch.where(key_clean, visible_text & (query.seen_document() == key.document), same_block)


def places(views: int, blocks: Tensor, documents: Tensor) -> Positions:
    """The positions of a whole training sample, ``[noisy views | clean]``.

    Args:
        views: Noisy views, V.
        blocks: [..., L] block of each place.
        documents: [..., L] document of each place.

    Returns:
        Four tensors of [..., (V + 1) L].
    """
    length = blocks.shape[-1]
    place = torch.arange(length, device=blocks.device)
    view = torch.tensor([*range(views), CLEAN], device=blocks.device).repeat_interleave(length)
    wide = [
        each.expand_as(blocks).repeat(*[1] * (blocks.dim() - 1), views + 1) for each in (place, blocks, documents)
    ]
    return Positions(view, *wide)


def dense_mask(length: int, block_size: int, views: int = 1, block_causal: bool = False) -> Tensor:
    """The rule for one document as a boolean table, True where attention is allowed: [(V+1) L, (V+1) L]."""
    blocks = torch.arange(length) // block_size
    everything = places(views, blocks, torch.zeros_like(blocks))
    return can_attend(everything.as_queries(), everything.as_keys(), block_causal)
