"""Block diffusion: a block at a time, several tokens a forward."""

from collections.abc import Sequence

import torch
from torch import Tensor

from nemodiff_train.decoding.generation import DecodingSettings, Generation
from nemodiff_train.decoding.session import Session


def decode_diffusion(
    session: Session, prompts: Sequence[Sequence[int]], settings: DecodingSettings
) -> list[Generation]:
    """Denoise blocks that start where the prompt ends (the released models' ``generate``).

    A block is its seed, the AR prediction left by the last causal forward, followed by masks.  Each
    denoising forward sees the committed text causally and the block bidirectionally, and fixes the
    places that are sure enough.  A full block is committed by one causal forward, whose last logits
    give the next seed.  Rows progress on their own: a row takes part in a forward only while it has
    something to gain from it, and none is run after its last block.
    """
    rows = [Generation(settings) for _ in prompts]
    seeds = session.prefill(prompts).argmax(-1)
    active = torch.arange(len(rows), device=session.device)
    while True:
        blocks, steps = _denoise(session, active, seeds, settings)
        for row, block, when in zip(active.tolist(), blocks.tolist(), steps.tolist(), strict=True):
            rows[row].extend(block, when)
        running = torch.tensor([not rows[row].finished for row in active.tolist()], device=session.device)
        active, blocks = active[running], blocks[running]
        if not len(active):
            return rows
        logits = session.forward(blocks, active, "commit", causal=True)
        session.commit(active, blocks.shape[1])
        seeds = logits[:, -1].argmax(-1)


def _denoise(session: Session, rows: Tensor, seeds: Tensor, settings: DecodingSettings) -> tuple[Tensor, Tensor]:
    """Fill one block a row; a row leaves the batch when its block is settled.

    Args:
        rows: [batch] rows of the session.
        seeds: [batch] first token of each block.

    Returns:
        The blocks' tokens and the forward that settled each, both [batch, block].
    """
    mask = session.mask_token_id
    assert mask is not None  # decode() refuses models without one
    blocks = seeds.new_full((len(seeds), settings.block_size), mask)
    blocks[:, 0] = seeds
    calls = torch.tensor([session.calls(row) for row in rows.tolist()], device=seeds.device)
    steps = calls[:, None].repeat(1, settings.block_size)
    while True:
        open_rows = _unsettled(blocks, mask, settings.stop_token_ids).nonzero()[:, 0]
        if not len(open_rows):
            return blocks, steps
        before = blocks[open_rows]
        logits = session.forward(before, rows[open_rows], "denoise", causal=False)
        blocks[open_rows] = commit_confident(before, logits, mask, settings.threshold)
        calls[open_rows] += 1
        steps[open_rows] = torch.where(before == mask, calls[open_rows, None], steps[open_rows])


def _unsettled(blocks: Tensor, mask: int, stops: frozenset[int]) -> Tensor:
    """[batch] rows with a mask before their first stop token (or any mask, without a stop token)."""
    masked = blocks == mask
    stopped = torch.isin(blocks, torch.tensor(sorted(stops), device=blocks.device)) if stops else masked & False
    before_stop = stopped.cumsum(1) == 0
    return (masked & before_stop).any(1)


def commit_confident(blocks: Tensor, logits: Tensor, mask: int, threshold: float) -> Tensor:
    """Fix the masked places whose best token reaches the threshold, and always the best place.

    Args:
        blocks: [batch, block] tokens.
        logits: [batch, block, vocab] of a bidirectional forward; place i predicts token i (no shift).
        mask: Id of the mask token.
        threshold: Probability from which a place is fixed.

    Returns:
        [batch, block] with at least one mask fewer in every row that has any.
    """
    masked = blocks == mask
    confidence, chosen = logits.softmax(-1).max(-1)
    confidence = confidence.masked_fill(~masked, -1.0)
    best = confidence == confidence.max(1, keepdim=True).values
    first_best = best & (best.cumsum(1) == 1)
    return torch.where(masked & ((confidence >= threshold) | first_best), chosen, blocks)
