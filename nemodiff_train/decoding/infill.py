"""Fill in the middle, and revision: the block decoder on text that has something on both sides."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from nemodiff_train.decoding.diffusion import denoise
from nemodiff_train.decoding.sampling import Sampler
from nemodiff_train.decoding.session import Session
from nemodiff_train.errors import UserError


@dataclass(frozen=True)
class Filled:
    """A text whose masked places have been filled."""

    tokens: list[int]
    """The whole text."""
    places: list[int]
    """Positions that were filled."""
    steps: list[int]
    """For each of them, which forward (counted from 1) settled it."""


def infill(session: Session, text: Sequence[int], sampler: Sampler) -> Filled:
    """Fill the mask tokens of a text, block by block from the left.

    A block begins at the place before its first mask and sees the text before it through the cache and
    itself bidirectionally: of what follows a mask, the rest of its block counts, and nothing behind it.  A
    finished block is committed by a causal forward.

    Args:
        session: One row, nothing committed, room for the text and a block more.
        text: Token ids, masks included.
        sampler: Chooses tokens; its settings give block size and policy.

    Raises:
        UserError: The text begins with a mask, or has none.
    """
    mask, size = session.mask_token_id, sampler.settings.block_size
    places = [place for place, token in enumerate(text) if token == mask]
    if not places:
        raise UserError("there is nothing to fill: the text has no mask token")
    if places[0] == 0:
        raise UserError("the text begins with a mask token; give at least one token before it")
    filled, steps, done = list(text), dict.fromkeys(places, 0), 0
    row = torch.arange(1, device=session.device)
    for place in places:
        if filled[place] != mask:
            continue
        start = place - 1
        if start > done:
            session.forward(torch.tensor([filled[done:start]], device=session.device), row, "prefill", causal=True)
            session.commit(row, start - done)
        block = torch.tensor([filled[start : start + size]], device=session.device)
        bounds = torch.tensor([[0], [size]], device=session.device)
        settled = denoise(session, row, block, sampler, bounds[0], bounds[1], stops=False)
        for offset, (token, step) in enumerate(zip(block[0].tolist(), settled[0].tolist(), strict=True)):
            if filled[start + offset] == mask:
                filled[start + offset], steps[start + offset] = token, step
        done = start
    return Filled(filled, places, [steps[place] for place in places])


def revise(session: Session, text: Sequence[int], start: int, least: float, sampler: Sampler) -> Filled:
    """Mask the tokens that the AR half finds improbable, and fill them again with both sides in view.

    Args:
        session: As for :func:`infill`.
        text: Prompt and draft.
        start: Place of the draft's first token; nothing before it changes.
        least: Probability below which a token is decoded again.
        sampler: As for :func:`infill`.

    Raises:
        UserError: ``least`` is no probability.
    """
    if not 0 < least <= 1:
        raise UserError(f"the least probability is {least}; use one above 0, at most 1")
    row = torch.arange(1, device=session.device)
    tokens = torch.tensor([list(text)], device=session.device)
    logits = session.forward(tokens, row, "verify", causal=True)[:, start - 1 : -1]
    probability = logits.softmax(-1).gather(-1, tokens[:, start:, None])[0, :, 0]
    doubtful = [start + place for place in (probability < least).nonzero()[:, 0].tolist()]
    if not doubtful:
        return Filled(list(text), [], [])
    assert session.mask_token_id is not None  # the caller refuses models without one
    masked = [session.mask_token_id if place in set(doubtful) else token for place, token in enumerate(text)]
    return infill(session, masked, sampler)
