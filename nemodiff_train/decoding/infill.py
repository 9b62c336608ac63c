"""Fill in the middle, and revision: the block decoder on text that has something on both sides."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from nemodiff_train.decoding.diffusion import denoise
from nemodiff_train.decoding.sampling import TokenSampler
from nemodiff_train.decoding.session import Session
from nemodiff_train.errors import UserError


@dataclass(frozen=True)
class Filled:
    """A text whose masked positions have been filled."""

    tokens: list[int]
    """Token ids of the whole text."""
    positions: list[int]
    """Positions that were filled."""


def infill(session: Session, text: Sequence[int], sampler: TokenSampler) -> Filled:
    """Fill the mask tokens of a text, block by block from the left.

    A block begins one position before its first mask and sees the text before it through the cache, and itself
    bidirectionally: of what follows a mask, the rest of its block counts, and nothing after that.  A causal forward
    commits a finished block.

    Args:
        session: One row, nothing committed, room for the text and one more block.
        text: Token ids, masks included.
        sampler: Chooses tokens; its settings give block size and policy.

    Raises:
        UserError: The text begins with a mask, or has none.
    """
    mask_token_id, size = session.mask_token_id, sampler.settings.block_size
    masked = [position for position, token in enumerate(text) if token == mask_token_id]
    if not masked:
        raise UserError("there is nothing to fill: the text has no mask token")
    if masked[0] == 0:
        raise UserError("the text begins with a mask token; give at least one token before it")
    tokens, committed = list(text), 0
    row = torch.arange(1)
    for position in masked:
        if tokens[position] != mask_token_id:
            continue  # an earlier block has filled it
        # Commit the text before the block, which starts at the token before the mask.
        start = position - 1
        if start > committed:
            before = torch.tensor([tokens[committed:start]], device=session.device)
            session.forward(before, row, "prefill", causal=True)
            session.commit(row, start - committed)
            committed = start
        block = torch.tensor([tokens[start : start + size]], device=session.device)
        bounds = torch.tensor([[0], [size]])
        denoise(session, row, block, sampler, bounds[0], bounds[1], stops=False)
        tokens[start : start + size] = block[0].tolist()
    return Filled(tokens, masked)


def revise(
    session: Session, text: Sequence[int], start: int, min_probability: float, sampler: TokenSampler
) -> Filled:
    """Mask the tokens that are improbable by the causal forward, and fill them again with both sides in view.

    Args:
        session: As for :func:`infill`.
        text: Prompt and draft.
        start: Position of the draft's first token; nothing before it changes.
        min_probability: Probability below which a token is decoded again.
        sampler: As for :func:`infill`.

    Raises:
        UserError: ``min_probability`` is not a probability above 0.
    """
    if not 0 < min_probability <= 1:
        raise UserError(f"min_probability (--revise) is {min_probability}; it must be above 0 and at most 1")
    row = torch.arange(1)
    tokens = torch.tensor([list(text)], device=session.device)
    # [1, draft, vocab] logits that predict the draft, and [draft] the probability of its tokens.
    logits = session.forward(tokens, row, "verify", causal=True)[:, start - 1 : -1]
    probability = logits.softmax(-1).gather(-1, tokens[:, start:, None])[0, :, 0]
    improbable = {start + index for index in (probability < min_probability).nonzero()[:, 0].tolist()}
    if not improbable:
        return Filled(list(text), [])
    assert session.mask_token_id is not None  # fill() refuses models without one
    masked = [session.mask_token_id if position in improbable else token for position, token in enumerate(text)]
    return infill(session, masked, sampler)
