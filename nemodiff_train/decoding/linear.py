"""Linear self-speculation: one bidirectional forward drafts a block, one causal forward verifies it."""

from collections.abc import Sequence

import torch
from torch import Tensor

from nemodiff_train.decoding.generation import DecodingSettings, Generation
from nemodiff_train.decoding.session import Session


def decode_linear(session: Session, prompts: Sequence[Sequence[int]], settings: DecodingSettings) -> list[Generation]:
    """Draft and verify until every row has ended (the released models' ``linear_spec_generate``).

    Every emitted token is the causal model's own greedy choice, so the output equals
    :func:`~nemodiff_train.decoding.ar.decode_ar`'s.  Each cycle commits the longest prefix of the
    draft that the verifier agrees with, and one token more: the verifier's at the first
    disagreement, or the one after a draft that was right throughout.
    """
    rows = [Generation(settings) for _ in prompts]
    last = session.prefill(prompts).argmax(-1)
    for row, token in enumerate(last.tolist()):
        rows[row].extend([token], [session.calls(row)])
    active = torch.arange(len(rows), device=session.device)
    while True:
        running = torch.tensor([not rows[row].finished for row in active.tolist()], device=session.device)
        active, last = active[running], last[running]
        if not len(active):
            return rows
        draft = _draft(session, active, last, settings.block_size)
        choice = session.forward(draft, active, "verify", causal=True).argmax(-1)
        agreed = choice[:, :-1] == draft[:, 1:]
        accepted = agreed.long().cumprod(1).sum(1) + 1
        session.commit(active, accepted)
        for place, row in enumerate(active.tolist()):
            tokens = choice[place, : accepted[place]].tolist()
            taken = rows[row].extend(tokens, [session.calls(row)] * len(tokens))
            rows[row].accepted.append(taken)
            rows[row].agreed.append(agreed[place].tolist())
            rows[row].drafts.append(draft[place, 1:].tolist())
        last = choice.gather(1, accepted[:, None] - 1)[:, 0]


def _draft(session: Session, rows: Tensor, last: Tensor, block_size: int) -> Tensor:
    """[batch, block]: each row's last token, then the diffusion mode's guess at every masked place."""
    assert session.mask_token_id is not None  # decode() refuses models without one
    block = last.new_full((len(rows), block_size), session.mask_token_id)
    block[:, 0] = last
    guess = session.forward(block, rows, "draft", causal=False).argmax(-1)
    return torch.cat([last[:, None], guess[:, 1:]], dim=1)
