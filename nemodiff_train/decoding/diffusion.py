"""Block diffusion: a block at a time, several tokens a forward."""

from collections.abc import Sequence

import torch
from torch import Tensor

from nemodiff_train.decoding.generation import DecodingSettings, Generation
from nemodiff_train.decoding.sampling import Sampler
from nemodiff_train.decoding.session import Session


def decode_diffusion(session: Session, prompts: Sequence[Sequence[int]], sampler: Sampler) -> list[Generation]:
    """Denoise block by block (the released models' ``generate``).

    Each denoising forward sees the committed text and, bidirectionally, the block, and fixes the places
    that are sure enough.  A full block is committed by one more forward.  Rows progress on their own: a row
    takes part in a forward only while it has something to gain from it, and none is run after its last block.

    The last block is denoised no further than the length limit.

    Blocks start where the prompt ends, and their first token, the seed, is the AR prediction left by the
    last causal forward.  A model with a block-causal clean half has its blocks counted from the start of
    the text, so that the prompt's end may be the beginning of the first one; it has seeds only if it was
    trained with the shift.
    """
    settings = sampler.settings
    rows = [Generation(settings) for _ in prompts]
    whole_blocks = session.model.config.clean_attention == "block_causal"
    blocks, known = (_open_whole_blocks if whole_blocks else _open_behind)(session, prompts, sampler)
    active = torch.arange(len(rows), device=session.device)
    while True:
        ends = torch.tensor([known[row] + rows[row].room for row in active.tolist()], device=session.device)
        starts = torch.tensor([known[row] for row in active.tolist()], device=session.device)
        steps = denoise(session, active, blocks, sampler, starts, ends)
        for place, row in enumerate(active.tolist()):
            new = slice(known[row], int(ends[place]))
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
            blocks[:, :1] = sampler.sample_tokens(logits[:, -1:], active)


def _has_seeds(session: Session) -> bool:
    """Whether the last place of the committed text predicts the next token."""
    config = session.model.config
    return bool(config.clean_attention == "causal" or config.shift)


def _masks(session: Session, rows: int, block_size: int) -> Tensor:
    assert session.mask_token_id is not None  # decode() refuses models without one
    return torch.full((rows, block_size), session.mask_token_id, device=session.device)


def _open_behind(session: Session, prompts: Sequence[Sequence[int]], sampler: Sampler) -> tuple[Tensor, list[int]]:
    """First blocks behind the prompts, and how many of their tokens belong to the prompt: none."""
    blocks = _masks(session, len(prompts), sampler.settings.block_size)
    rows = torch.arange(len(prompts), device=blocks.device)
    blocks[:, :1] = sampler.sample_tokens(session.prefill(prompts)[:, None], rows)
    return blocks, [0] * len(prompts)


def _open_whole_blocks(
    session: Session, prompts: Sequence[Sequence[int]], sampler: Sampler
) -> tuple[Tensor, list[int]]:
    """First blocks that begin with what the prompts have behind their last whole block."""
    block_size = sampler.settings.block_size
    blocks = _masks(session, len(prompts), block_size)
    ends = [len(prompt) // block_size * block_size for prompt in prompts]
    if any(ends):
        seeds = session.prefill([prompt[:end] for prompt, end in zip(prompts, ends, strict=True)], block_size)
        if _has_seeds(session):
            committed = torch.tensor(ends, device=blocks.device).nonzero()[:, 0]  # only they draw
            blocks[committed, :1] = sampler.sample_tokens(seeds[committed, None], committed)
    for row, (prompt, end) in enumerate(zip(prompts, ends, strict=True)):
        blocks[row, : len(prompt) - end] = torch.tensor(prompt[end:], device=blocks.device)
    return blocks, [len(prompt) - end for prompt, end in zip(prompts, ends, strict=True)]


def denoise(
    session: Session,
    rows: Tensor,
    blocks: Tensor,
    sampler: Sampler,
    starts: Tensor,
    ends: Tensor,
    stops: bool = True,
) -> Tensor:
    """Fill one block a row in place; a row leaves the batch when its block is settled.

    Args:
        rows: [batch] rows of the session.
        blocks: [batch, block] tokens, masks where they are still to be found.
        sampler: Chooses tokens; its settings name the policy.
        starts: [batch] place of each block from which it is new; before, a stop token ends nothing.
        ends: [batch] place of each block from which nothing is asked for.
        stops: Whether a row is settled once there is no mask before its first stop token.

    Returns:
        The forward that settled each place, [batch, block].
    """
    mask = session.mask_token_id
    assert mask is not None  # decode() refuses models without one
    calls = torch.tensor([session.calls(row) for row in rows.tolist()], device=blocks.device)
    steps = calls[:, None].repeat(1, blocks.shape[1])
    places = torch.arange(blocks.shape[1], device=blocks.device)
    wanted = (places >= starts[:, None]) & (places < ends[:, None])
    ends_row = sampler.settings.stop_token_ids if stops else frozenset()
    step = 0
    while True:
        open_rows = rows_with_masks(blocks, wanted, mask, ends_row).nonzero()[:, 0]
        if not len(open_rows):
            return steps
        before = blocks[open_rows]
        logits = session.forward(before, rows[open_rows], "denoise", causal=False)
        chosen = sampler.sample_tokens(logits, rows[open_rows])
        fixed = select_positions_to_unmask(
            logits, chosen, (before == mask) & wanted[open_rows], sampler.settings, step
        )
        blocks[open_rows] = torch.where(fixed, chosen, before)
        calls[open_rows] += 1
        step += 1
        steps[open_rows] = torch.where(before == mask, calls[open_rows, None], steps[open_rows])


def rows_with_masks(blocks: Tensor, wanted: Tensor, mask: int, stops: frozenset[int]) -> Tensor:
    """[batch] rows with a wanted mask before their first stop token (or any, without a stop token)."""
    masked = (blocks == mask) & wanted
    stopped = torch.isin(blocks, torch.tensor(sorted(stops), dtype=blocks.dtype, device=blocks.device)) & wanted
    before_stop = stopped.cumsum(1) == 0
    return (masked & before_stop).any(1)


def select_positions_to_unmask(
    logits: Tensor, chosen: Tensor, masked: Tensor, settings: DecodingSettings, step: int
) -> Tensor:
    """The masked places that a denoising forward fixes, under the settings' policy; at least one a row.

    Args:
        logits: [batch, block, vocab] of a bidirectional forward.
        chosen: [batch, block] tokens; the confidence of a place is its token's probability at temperature 1.
        masked: [batch, block] places that may be fixed; every row has one.
        settings: Policy and its parameter.
        step: Forwards that the block has had before.

    Returns:
        [batch, block] boolean.
    """
    log_p = logits.log_softmax(-1)
    confidence = log_p.gather(-1, chosen[..., None])[..., 0].exp()
    if settings.policy == "entropy":
        confidence = (log_p.exp() * log_p.clamp(min=-1e9)).sum(-1)  # minus the entropy; 0 x -inf is 0 here
    order = confidence.masked_fill(~masked, -torch.inf).argsort(dim=1, descending=True, stable=True)
    rank = order.argsort(1)
    if settings.policy == "threshold":
        return masked & ((confidence >= settings.threshold) | (rank == 0))
    if settings.policy == "fixed":
        left = masked.sum(1, keepdim=True)
        share = (left + max(settings.steps - step, 1) - 1) // max(settings.steps - step, 1)
        return masked & (rank < share)
    if settings.policy == "entropy":
        # Sorted by entropy, the largest is the last: what must stay below the bound is the sum before it.
        entropy = (-confidence * masked).gather(1, order)
        before = entropy.cumsum(1) - entropy
        return masked & (before <= settings.entropy_bound).gather(1, rank)
    from_left = masked.cumsum(1)
    run = (~masked | (confidence >= settings.threshold)).long().cumprod(1).bool()
    return masked & (run | (from_left == 1))
