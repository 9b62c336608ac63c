"""Block diffusion: one block at a time, several tokens per forward."""

from collections.abc import Sequence

import torch
from torch import Tensor

from nemodiff_train.decoding.generation import DecodingSettings, Generation
from nemodiff_train.decoding.sampling import TokenSampler
from nemodiff_train.decoding.session import Session, drop_finished
from nemodiff_train.model.provider import TriModeModelProvider
from nemodiff_train.sampler.features import SlotHistory


def decode_diffusion(session: Session, prompts: Sequence[Sequence[int]], sampler: TokenSampler) -> list[Generation]:
    """Denoise block by block (``generate`` of the released Nemotron-Labs-Diffusion models).

    Each denoising forward sees the committed text and, bidirectionally, the block, and unmasks the positions
    that the policy selects.  One more forward commits a finished block.  Rows progress on their own: a row takes
    part in a forward only while it can gain from it, none is run after its last block, and the last block is
    denoised no further than the length limit.

    Blocks start where the prompt ends, and their first token is known: the AR prediction left by the last
    causal forward.  A model with block-causal clean attention has its blocks counted from the start of the text,
    so that the prompt's end may be the beginning of the first one; it knows first tokens only if it was trained with
    the shift.

    Args:
        session: One row per prompt, nothing committed.
        prompts: Token ids of each prompt.
        sampler: Chooses tokens; its settings give the block size and the policy.

    Returns:
        One generation per prompt.
    """
    settings = sampler.settings
    rows = [Generation(settings) for _ in prompts]
    blocks_from_text_start = session.model.config.clean_attention == "block_causal"
    # blocks [batch, block]; of each row's first block, the leading ``known`` tokens belong to the prompt.
    blocks, known = _first_blocks(session, prompts, sampler, blocks_from_text_start)
    active = torch.arange(len(rows))
    while True:
        starts = torch.tensor([known[row] for row in active.tolist()])
        ends = torch.tensor([known[row] + rows[row].remaining_tokens for row in active.tolist()])
        steps = denoise(session, active, blocks, sampler, starts, ends)
        for row, start, end, *columns in zip(active, starts, ends, blocks.tolist(), steps.tolist(), strict=True):
            rows[row].extend(*(column[start:end] for column in columns))
        known = [0] * len(rows)
        active, blocks = drop_finished(rows, active, blocks)
        if not len(active):
            return rows
        # Write the finished blocks to the cache; the logits after their last token give the next first tokens.
        logits = session.forward(blocks, active, "commit", causal=not blocks_from_text_start)
        session.commit(active, blocks.shape[1])
        blocks = session.masks(len(active), settings.block_size)
        if has_known_first_token(session.model.config):
            blocks[:, :1] = sampler.sample_tokens(logits[:, -1:], active)


def has_known_first_token(config: TriModeModelProvider) -> bool:
    """Return whether the last position of the committed text predicts the next token."""
    return bool(config.clean_attention == "causal" or config.shift)


def _first_blocks(
    session: Session, prompts: Sequence[Sequence[int]], sampler: TokenSampler, blocks_from_text_start: bool
) -> tuple[Tensor, list[int]]:
    """Commit what precedes the first blocks; return these [batch, block], and how many tokens each has of its prompt.

    With ``blocks_from_text_start`` blocks are counted from the start of the text, else from the end of the prompt.
    """
    block_size = sampler.settings.block_size
    blocks = session.masks(len(prompts), block_size)
    ends = [len(prompt) // block_size * block_size if blocks_from_text_start else len(prompt) for prompt in prompts]
    if any(ends):
        before = [prompt[:end] for prompt, end in zip(prompts, ends, strict=True)]
        logits = session.prefill(before, block_size if blocks_from_text_start else None)
        if has_known_first_token(session.model.config):
            committed = torch.tensor(ends).nonzero()[:, 0]  # only these rows have a known first token
            blocks[committed, :1] = sampler.sample_tokens(logits[committed, None], committed)
    for row, (prompt, end) in enumerate(zip(prompts, ends, strict=True)):
        blocks[row, : len(prompt) - end] = torch.tensor(prompt[end:], device=blocks.device)
    return blocks, [len(prompt) - end for prompt, end in zip(prompts, ends, strict=True)]


def denoise(
    session: Session,
    rows: Tensor,
    blocks: Tensor,
    sampler: TokenSampler,
    starts: Tensor,
    ends: Tensor,
    stops: bool = True,
) -> Tensor:
    """Unmask one block per row, in place; a row leaves the batch when its block is finished.

    Args:
        session: The rows' cache.
        rows: [batch] rows of the session, on the host.
        blocks: [batch, block] tokens, masks where they are to be found.
        sampler: Chooses tokens; its settings give the policy.
        starts: [batch] index in the block from which tokens are new, on the host; a stop token before it ends
            nothing.
        ends: [batch] index in the block from which nothing is asked for, on the host.
        stops: Whether a row is finished once no mask precedes its first stop token.

    Returns:
        [batch, block] which of the row's forwards, counted from 1, unmasked each position.
    """
    mask_token_id = session.mask_token_id
    assert mask_token_id is not None  # decode() refuses models without one
    calls = torch.tensor([session.calls(row) for row in rows.tolist()], device=blocks.device)
    steps = calls[:, None].repeat(1, blocks.shape[1])
    index = torch.arange(blocks.shape[1])
    wanted = ((index >= starts[:, None]) & (index < ends[:, None])).to(blocks.device)  # [batch, block]
    stop_token_ids = sampler.settings.stop_token_ids if stops else frozenset()
    trained, history, step = sampler.settings.trained_sampler, SlotHistory(blocks), 0
    while True:
        # Rows [open] that still have something to unmask, and their blocks [open, block].
        unfinished = _rows_with_masks(blocks, wanted, mask_token_id, stop_token_ids).cpu().nonzero()[:, 0]
        if not len(unfinished):
            return steps
        before = blocks[unfinished]
        masked = before == mask_token_id
        # A token for every position, [open, block], of which the policy takes some of the masked ones.
        logits = session.forward(before, rows[unfinished], "denoise", causal=False)
        tokens = sampler.sample_tokens(logits, rows[unfinished])
        confidence = None
        if trained is not None:
            confidence = trained(history.observe(unfinished, logits, tokens, before, masked))
        may_unmask = masked & wanted[unfinished]
        unmask = select_positions_to_unmask(logits, tokens, may_unmask, sampler.settings, step, confidence)
        blocks[unfinished] = torch.where(unmask, tokens, before)
        # A position's step is that of the last forward that began with it masked.
        calls[unfinished] += 1
        step += 1
        steps[unfinished] = torch.where(masked, calls[unfinished, None], steps[unfinished])


def _rows_with_masks(blocks: Tensor, wanted: Tensor, mask_token_id: int, stop_token_ids: frozenset[int]) -> Tensor:
    """Return [batch] which rows have a wanted mask, before their first wanted stop token if there is one."""
    masked = (blocks == mask_token_id) & wanted
    stop = torch.tensor(sorted(stop_token_ids), dtype=blocks.dtype, device=blocks.device)
    before_stop = (torch.isin(blocks, stop) & wanted).cumsum(1) == 0
    return (masked & before_stop).any(1)


def select_positions_to_unmask(
    logits: Tensor,
    tokens: Tensor,
    masked: Tensor,
    settings: DecodingSettings,
    step: int,
    confidence: Tensor | None = None,
) -> Tensor:
    """Select the masked positions that a denoising forward unmasks under the settings' policy; at least one per row.

    Args:
        logits: [batch, block, vocab] of a bidirectional forward.
        tokens: [batch, block]; the confidence of a position is its token's probability at temperature 1.
        masked: [batch, block] boolean: positions that may be unmasked; every row has one.
        settings: Policy and its parameter.
        step: Number of forwards that the block has had before.
        confidence: [batch, block] of a trained sampler; None where the logits give it.

    Returns:
        [batch, block] boolean.
    """
    if confidence is None:  # [batch, block] the probability of each token; for ``entropy``, minus the entropy in nats
        log_probs = logits.log_softmax(-1)
        confidence = log_probs.gather(-1, tokens[..., None])[..., 0].exp()
        if settings.policy == "entropy":
            confidence = (log_probs.exp() * log_probs.clamp(min=-1e9)).sum(-1)  # 0 x -inf is 0 here
    if settings.policy in ("threshold", "trained"):
        return select_by_threshold(confidence, masked, settings.threshold)
    order, rank = _by_confidence(confidence, masked)  # [batch, block] each
    if settings.policy == "fixed":
        # An even share of the masks that are left, over the forwards that are left, rounded up.
        forwards_left = max(settings.steps - step, 1)
        share = (masked.sum(1, keepdim=True) + forwards_left - 1) // forwards_left
        return masked & (rank < share)
    if settings.policy == "entropy":
        # EB-Sampler (arXiv 2505.24857): by rising entropy, take positions while the sum of the entropies except
        # the largest, which is the last one's, stays within the bound.
        entropy = (-confidence * masked).gather(1, order)
        sum_before = entropy.cumsum(1) - entropy
        return masked & (sum_before <= settings.entropy_bound).gather(1, rank)
    # leftmost: the run of confident or known positions from the left, and always the first masked one.
    run = (~masked | (confidence >= settings.threshold)).long().cumprod(1).bool()
    return masked & (run | (masked.cumsum(1) == 1))


def select_by_threshold(confidence: Tensor, masked: Tensor, threshold: float | Tensor) -> Tensor:
    """Return the masked positions [batch, block] whose confidence reaches a threshold, and the best one of each row.

    Args:
        confidence: [batch, block].
        masked: [batch, block] boolean: positions that may be unmasked.
        threshold: One for all rows, or [batch, 1].
    """
    _, rank = _by_confidence(confidence, masked)
    return masked & ((confidence >= threshold) | (rank == 0))


def _by_confidence(confidence: Tensor, masked: Tensor) -> tuple[Tensor, Tensor]:
    """Return the indices [batch, block] by falling confidence, masked positions first, and their inverse: ranks."""
    order = confidence.masked_fill(~masked, -torch.inf).argsort(dim=1, descending=True, stable=True)
    return order, order.argsort(1)
