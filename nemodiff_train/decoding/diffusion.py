"""Block diffusion: a block at a time, several tokens a forward."""

from collections.abc import Sequence

import torch
from torch import Tensor

from nemodiff_train.decoding.generation import DecodingSettings, Generation
from nemodiff_train.decoding.session import Session


def decode_diffusion(
    session: Session, prompts: Sequence[Sequence[int]], settings: DecodingSettings
) -> list[Generation]:
    """Denoise block by block (the released models' ``generate``).

    Each denoising forward sees the committed text and, bidirectionally, the block, and fixes the places
    that are sure enough.  A full block is committed by one more forward.  Rows progress on their own: a row
    takes part in a forward only while it has something to gain from it, and none is run after its last block.

    Blocks start where the prompt ends, and their first token, the seed, is the AR prediction left by the
    last causal forward.  A model with a block-causal clean half has its blocks counted from the start of
    the text, so that the prompt's end may be the beginning of the first one; it has seeds only if it was
    trained with the shift.
    """
    rows = [Generation(settings) for _ in prompts]
    whole_blocks = session.model.config.clean_half == "block_causal"
    blocks, known = (_open_whole_blocks if whole_blocks else _open_behind)(session, prompts, settings.block_size)
    active = torch.arange(len(rows), device=session.device)
    while True:
        steps = _denoise(session, active, blocks, settings)
        for place, row in enumerate(active.tolist()):
            new = slice(known[row], None)
            rows[row].extend(blocks[place, new].tolist(), steps[place, new].tolist())
        known = [0] * len(rows)
        running = torch.tensor([not rows[row].finished for row in active.tolist()], device=session.device)
        active, blocks = active[running], blocks[running]
        if not len(active):
            return rows
        logits = session.forward(blocks, active, "commit", causal=not whole_blocks)
        session.commit(active, blocks.shape[1])
        blocks = _masks(session, len(active), settings.block_size)
        if _has_seeds(session):
            blocks[:, 0] = logits[:, -1].argmax(-1)


def _has_seeds(session: Session) -> bool:
    """Whether the last place of the committed text predicts the next token."""
    config = session.model.config
    return bool(config.clean_half == "causal" or config.shift)


def _masks(session: Session, rows: int, block_size: int) -> Tensor:
    assert session.mask_token_id is not None  # decode() refuses models without one
    return torch.full((rows, block_size), session.mask_token_id, device=session.device)


def _open_behind(session: Session, prompts: Sequence[Sequence[int]], block_size: int) -> tuple[Tensor, list[int]]:
    """First blocks behind the prompts, and how many of their tokens belong to the prompt: none."""
    blocks = _masks(session, len(prompts), block_size)
    blocks[:, 0] = session.prefill(prompts).argmax(-1)
    return blocks, [0] * len(prompts)


def _open_whole_blocks(
    session: Session, prompts: Sequence[Sequence[int]], block_size: int
) -> tuple[Tensor, list[int]]:
    """First blocks that begin with what the prompts have behind their last whole block."""
    blocks = _masks(session, len(prompts), block_size)
    ends = [len(prompt) // block_size * block_size for prompt in prompts]
    if any(ends):
        seeds = session.prefill([prompt[:end] for prompt, end in zip(prompts, ends, strict=True)], block_size)
        if _has_seeds(session):
            committed = torch.tensor(ends, device=blocks.device) > 0
            blocks[committed, 0] = seeds.argmax(-1)[committed]
    for row, (prompt, end) in enumerate(zip(prompts, ends, strict=True)):
        blocks[row, : len(prompt) - end] = torch.tensor(prompt[end:], device=blocks.device)
    return blocks, [len(prompt) - end for prompt, end in zip(prompts, ends, strict=True)]


def _denoise(session: Session, rows: Tensor, blocks: Tensor, settings: DecodingSettings) -> Tensor:
    """Fill one block a row in place; a row leaves the batch when its block is settled.

    Args:
        rows: [batch] rows of the session.
        blocks: [batch, block] tokens, masks where they are still to be found.

    Returns:
        The forward that settled each place, [batch, block].
    """
    mask = session.mask_token_id
    assert mask is not None  # decode() refuses models without one
    calls = torch.tensor([session.calls(row) for row in rows.tolist()], device=blocks.device)
    steps = calls[:, None].repeat(1, settings.block_size)
    while True:
        open_rows = _unsettled(blocks, mask, settings.stop_token_ids).nonzero()[:, 0]
        if not len(open_rows):
            return steps
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
