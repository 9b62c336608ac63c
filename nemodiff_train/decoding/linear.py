"""Linear self-speculation: one bidirectional forward drafts a block, one causal forward verifies it."""

from collections.abc import Sequence

import torch
from torch import Tensor

from nemodiff_train.decoding.generation import Generation
from nemodiff_train.decoding.sampling import Sampler, verify
from nemodiff_train.decoding.session import Session


def decode_linear(session: Session, prompts: Sequence[Sequence[int]], sampler: Sampler) -> list[Generation]:
    """Draft and verify until every row has ended (the released models' ``linear_spec_generate``).

    What is emitted is the causal model's own choice: at temperature 0 the output equals
    :func:`~nemodiff_train.decoding.ar.decode_ar`'s, above it is distributed as that.  Each cycle commits
    the part of the draft that the verifier keeps, and one token more: the verifier's at the first
    place it does not keep, or the one behind a draft that was kept throughout.
    """
    rows = [Generation(sampler.settings) for _ in prompts]
    active = torch.arange(len(rows), device=session.device)
    last = sampler.sample_tokens(session.prefill(prompts)[:, None], active)
    for row, token in enumerate(last[:, 0].tolist()):
        rows[row].extend([token], [session.calls(row)])
    while True:
        running = torch.tensor([not rows[row].finished for row in active.tolist()], device=session.device)
        active, last = active[running], last[running]
        if not len(active):
            return rows
        masks = _masks(session, len(active), sampler.settings.block_size - 1)
        guess = session.forward(torch.cat([last, masks], dim=1), active, "draft", causal=False)[:, 1:]
        draft = sampler.sample_tokens(guess, active)
        logits = session.forward(torch.cat([last, draft], dim=1), active, "verify", causal=True)
        last = commit_accepted(session, rows, active, verify(sampler, draft, guess, logits, active), draft)[0]


def commit_accepted(
    session: Session, rows: list[Generation], active: Tensor, verified: tuple[Tensor, Tensor, Tensor], draft: Tensor
) -> tuple[Tensor, Tensor]:
    """Commit what a verification kept, and note the cycle.

    Args:
        rows: All generations of the batch.
        active: [batch] rows of this cycle.
        verified: What :func:`~nemodiff_train.decoding.sampling.verify` returned.
        draft: [batch, k] drafted tokens.

    Returns:
        The last token committed, which is not in the cache yet, [batch, 1]; and how many were, [batch].
    """
    kept, emitted, acceptance = verified
    counts = kept.long().cumprod(1).sum(1) + 1
    session.commit(active, counts)
    for place, row in enumerate(active.tolist()):
        tokens = emitted[place, : counts[place]].tolist()
        cycle = (draft[place].tolist(), kept[place].tolist(), acceptance[place].tolist())
        rows[row].extend_by_cycle(tokens, session.calls(row), *cycle)
    return emitted.gather(1, counts[:, None] - 1), counts


def _masks(session: Session, rows: int, places: int) -> Tensor:
    assert session.mask_token_id is not None  # decode() refuses models without one
    return torch.full((rows, places), session.mask_token_id, device=session.device)
