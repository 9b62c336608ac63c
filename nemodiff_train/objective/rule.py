"""The attention rule over noisy and clean positions; every kernel is tested against this predicate."""

from typing import NamedTuple

import torch
from torch import Tensor

CLEAN = -1
"""The ``view`` of clean positions; noisy views count from 0."""


class Positions(NamedTuple):
    """View, position, block and document of some positions: four integer tensors that broadcast together."""

    view: Tensor
    """Index of the noisy view, or :data:`CLEAN`."""
    position: Tensor
    """Position in the sample, 0 .. L-1, the same in every view."""
    block: Tensor
    """Index of the block in the sample; a block never spans two documents."""
    document: Tensor
    """Index of the document in the sample; -1 - d for padding of document d, which sees what d sees, and whose clean
    half nothing sees."""

    def seen_document(self) -> Tensor:
        """Return the index of the document whose text each position sees."""
        return torch.where(self.document < 0, -1 - self.document, self.document)

    def as_queries(self) -> "Positions":
        """Add a last axis, to broadcast over keys."""
        return Positions(*(values[..., :, None] for values in self))

    def as_keys(self) -> "Positions":
        """Add a second-to-last axis, to broadcast over queries."""
        return Positions(*(values[..., None, :] for values in self))

    def at(self, index: Tensor) -> "Positions":
        """Select positions by their index on the last axis."""
        return Positions(*(values[..., index] for values in self))


def can_attend(query: Positions, key: Positions, block_causal: bool = False, causal_noise: bool = False) -> Tensor:
    """Return whether each query may see each key (FlexAttention calls such a predicate a ``mask_mod``).

    ======= ======= ======================================================================
    query   key     allowed when
    ======= ======= ======================================================================
    noisy   noisy   same view and same block; with ``causal_noise``, the key is at or
                    before the query as well
    noisy   clean   same document, and the key's block is earlier than the query's
    clean   clean   same document, and the key is at or before the query; with
                    ``block_causal``, the key's block is the query's or earlier
    clean   noisy   never
    ======= ======= ======================================================================

    (Nemotron-Labs-Diffusion, arXiv 2607.05722, section 2.2; ``block_causal``: BD3-LM, arXiv 2503.09573;
    ``causal_noise``: Uno, arXiv 2609.04010.)  The causal clean half is exactly an AR model's view, so the AR loss
    shares the forward pass without leaking.

    Returns:
        Boolean tensor of the broadcast shape.
    """
    query_clean, key_clean = query.view == CLEAN, key.view == CLEAN
    # Of the broadcast shape, [..., queries, keys]: the keys that a query sees of clean text, and of the noisy views.
    not_later = query.block >= key.block if block_causal else query.position >= key.position
    visible_text = torch.where(query_clean, not_later, query.block > key.block)
    same_block = (query.view == key.view) & (query.block == key.block)  # False for a clean query and a noisy key
    if causal_noise:
        same_block = same_block & (query.position >= key.position)
    return torch.where(key_clean, visible_text & (query.seen_document() == key.document), same_block)
