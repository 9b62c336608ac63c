"""Autoregressive decoding: one token per forward."""

from collections.abc import Sequence

import torch

from nemodiff_train.decoding.generation import Generation
from nemodiff_train.decoding.sampling import TokenSampler
from nemodiff_train.decoding.session import Session, drop_finished


def decode_ar(session: Session, prompts: Sequence[Sequence[int]], sampler: TokenSampler) -> list[Generation]:
    """Prefill, then run one causal forward per token for every row that has not ended.

    The prefill predicts the first token, so n tokens cost n forwards with it and n - 1 without.

    Args:
        session: One row per prompt, nothing committed.
        prompts: Token ids of each prompt.
        sampler: Chooses tokens.

    Returns:
        One generation per prompt.
    """
    rows = [Generation(sampler.settings) for _ in prompts]
    active = torch.arange(len(rows))
    tokens = sampler.sample_tokens(session.prefill(prompts)[:, None], active)  # [batch, 1]
    while True:
        session.emit(rows, active, tokens)
        active, tokens = drop_finished(rows, active, tokens)
        if not len(active):
            return rows
        logits = session.forward(tokens, active, "decode", causal=True)  # [batch, 1, vocab]
        session.commit(active, 1)
        tokens = sampler.sample_tokens(logits, active)
