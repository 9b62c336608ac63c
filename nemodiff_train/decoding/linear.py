"""Linear self-speculation: one forward drafts a block, one causal forward verifies it."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from nemodiff_train.decoding.generation import Cycle, Generation
from nemodiff_train.decoding.path_distribution import PathDistribution
from nemodiff_train.decoding.sampling import TokenSampler, Verification, rejection_sample
from nemodiff_train.decoding.session import Session, drop_finished


class Draft(NamedTuple):
    """Output of a draft forward for the k positions after the known tokens of some rows."""

    logits: Tensor
    """[batch, k, vocab]."""
    contexts: Tensor
    """[batch, k, rank] of the path selector's scores; of rank 0 without one."""


Verify = Callable[[Session, list[Generation], Tensor, Tensor, Draft, TokenSampler], Tensor]
"""Verifies a draft after a known token and commits what it accepts.  Takes the session, all generations, the rows
[batch] on the host, the token [batch, 1], the draft and the sampler; returns the next known token [batch, 1]."""


def decode_linear(
    session: Session, prompts: Sequence[Sequence[int]], sampler: TokenSampler, verify: Verify | None = None
) -> list[Generation]:
    """Draft and verify until every row has ended (``linear_spec_generate`` of the released models).

    All tokens are the causal model's own: at temperature 0 the output equals that of
    :func:`~nemodiff_train.decoding.ar.decode_ar`, above it is distributed as that.  Each cycle commits the
    accepted draft tokens and one token of the verifier: the recovered token at the first rejected position, or the
    bonus token after a wholly accepted draft.

    Args:
        session: One row per prompt, nothing committed.
        prompts: Token ids of each prompt.
        sampler: Chooses tokens; its settings give the block size, a draft's length plus one.
        verify: Verifies drafts; by default one token per drafted position.

    Returns:
        One generation per prompt.
    """
    verify = verify or _verify_chain
    rows = [Generation(sampler.settings) for _ in prompts]
    active = torch.arange(len(rows))
    last = sampler.sample_tokens(session.prefill(prompts)[:, None], active)  # [batch, 1]
    session.emit(rows, active, last)
    while True:
        active, last = drop_finished(rows, active, last)
        if not len(active):
            return rows
        active, last, *draft = _draft(session, rows, active, last, sampler)
        if len(active):
            last = verify(session, rows, active, last, Draft(*draft), sampler)


def _draft(
    session: Session, rows: list[Generation], active: Tensor, last: Tensor, sampler: TokenSampler
) -> tuple[Tensor, ...]:
    """Draft k = block - 1 tokens after the last committed one, as the model's drafter does.

    Where that token is outside the drafter's block, the forward has computed it as the model itself: it is kept, and
    so is the token that its logits give, which the draft then follows.  Returns the rows [batch] that the draft is
    for, their last known token [batch, 1], and what a :class:`Draft` holds.
    """
    kind, unknown = session.draft_kind, sampler.settings.block_size - 1
    if kind.uniform_noise:
        filling = (sampler.uniform(active, unknown, session.device) * session.vocab_size).long()
    else:
        filling = session.masks(len(active), unknown)
    output = session.forward(torch.cat([last, filling], dim=1), active, "draft", causal=kind.causal)
    logits, contexts = output[:, 1:].tensor_split([session.vocab_size], dim=-1)
    if kind.known_token_in_block:
        return active, last, logits, contexts
    session.commit(active, 1)
    next_token = sampler.sample_tokens(output[:, :1, : session.vocab_size], active)
    session.emit(rows, active, next_token)
    for row in active.tolist():
        if rows[row].finished:
            rows[row].cycles.append(Cycle(accepted=0, target_tokens=1))
    return drop_finished(rows, active, next_token, logits, contexts)


def _verify_chain(
    session: Session, rows: list[Generation], active: Tensor, last: Tensor, draft: Draft, sampler: TokenSampler
) -> Tensor:
    """Verify one token per drafted position."""
    # Tokens [batch, k] to verify, and the logits [batch, k, vocab] of the distributions that they are from.
    if session.selector_tables is None:
        draft_tokens, draft_logits = sampler.sample_tokens(draft.logits, active), draft.logits
    else:
        paths = PathDistribution.from_draft(session.selector_tables, *draft)
        draft_tokens, draft_logits = paths.sample_path(sampler, last, active)
    # The known token and the draft, causally; logits of index i predict the token at i + 1.
    target_logits = session.forward(torch.cat([last, draft_tokens], dim=1), active, "verify", causal=True)
    verification = rejection_sample(sampler, draft_tokens, draft_logits, target_logits, active)
    # A cycle's own tokens of the verifier, less the recovered or the bonus token.
    target_tokens = session.draft_kind.target_tokens_per_cycle - 1
    return commit_accepted(session, rows, active, verification, target_tokens)


def commit_accepted(
    session: Session, rows: list[Generation], active: Tensor, verification: Verification, target_tokens: int = 0
) -> Tensor:
    """Commit the token before each draft and the accepted draft tokens, and append the cycle to the generations.

    Args:
        session: Its last forward verified the drafts.
        rows: All generations of the batch.
        active: [batch] rows of this cycle, on the host.
        verification: Result of the verification.
        target_tokens: Number of tokens before it that the draft's forward has given as the verifier's own.

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
            target_tokens,
        )
    return verification.tokens.gather(1, verification.accepted[:, None])
