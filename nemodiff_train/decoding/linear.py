"""Linear self-speculation: one bidirectional forward drafts a block, one causal forward verifies it."""

from collections.abc import Sequence

import torch
from torch import Tensor

from nemodiff_train.decoding.generation import Generation
from nemodiff_train.decoding.sampling import Sampler, Verification, rejection_sample
from nemodiff_train.decoding.session import Session


def decode_linear(session: Session, prompts: Sequence[Sequence[int]], sampler: Sampler) -> list[Generation]:
    """Draft and verify until every row has ended (``linear_spec_generate`` of the released models).

    What is emitted is the causal model's own choice: at temperature 0 the output equals that of
    :func:`~nemodiff_train.decoding.ar.decode_ar`, above it is distributed as that.  Each cycle commits the
    accepted draft tokens and one token of the verifier: the recovered token at the first rejected position, or the
    bonus token after a wholly accepted draft.

    Args:
        session: One row per prompt, nothing committed.
        prompts: Token ids of each prompt.
        sampler: Chooses tokens; its settings give the block size, a draft's length plus one.

    Returns:
        One generation per prompt.
    """
    rows = [Generation(sampler.settings) for _ in prompts]
    active = torch.arange(len(rows))
    last = sampler.sample_tokens(session.prefill(prompts)[:, None], active)  # [batch, 1]
    for row, token in enumerate(last[:, 0].tolist()):
        rows[row].extend([token], [session.calls(row)])
    while True:
        running = torch.tensor([not rows[row].finished for row in active.tolist()])
        active, last = active[running], last[running]
        if not len(active):
            return rows
        # Draft: the last committed token and k = block - 1 masks, all of which see each other.
        masks = session.masks(len(active), sampler.settings.block_size - 1)
        draft_logits = session.forward(torch.cat([last, masks], dim=1), active, "draft", causal=False)[:, 1:]
        draft_tokens = sampler.sample_tokens(draft_logits, active)  # [batch, k]
        # Verify: the same k + 1 positions, causally; logits of index i predict the token at i + 1.
        target_logits = session.forward(torch.cat([last, draft_tokens], dim=1), active, "verify", causal=True)
        verification = rejection_sample(sampler, draft_tokens, draft_logits, target_logits, active)
        last = commit_accepted(session, rows, active, verification)


def commit_accepted(session: Session, rows: list[Generation], active: Tensor, verification: Verification) -> Tensor:
    """Commit the token before each draft and the accepted draft tokens, and append the cycle to the generations.

    Args:
        session: Its last forward verified the drafts.
        rows: All generations of the batch.
        active: [batch] rows of this cycle, on the host.
        verification: Result of the verification.

    Returns:
        [batch, 1] the recovered or bonus token of each row, which is emitted and not in the cache yet.
    """
    host = verification.on_host()
    emitted = host.accepted + 1  # [batch]
    session.commit(active, emitted)
    for index, row in enumerate(active.tolist()):
        rows[row].extend_by_cycle(
            host.tokens[index, : emitted[index]].tolist(),
            session.calls(row),
            host.draft_tokens[index].tolist(),
            host.accept_mask[index].tolist(),
            host.accept_probs[index].tolist(),
        )
    return verification.tokens.gather(1, verification.accepted[:, None])
