"""Autoregressive decoding: one token a forward."""

from collections.abc import Sequence

import torch

from nemodiff_train.decoding.generation import Generation
from nemodiff_train.decoding.sampling import Sampler
from nemodiff_train.decoding.session import Session


def decode_ar(session: Session, prompts: Sequence[Sequence[int]], sampler: Sampler) -> list[Generation]:
    """Prefill, then one causal forward a token, for every row that has not ended.

    The prefill predicts the first token, so n tokens cost n forwards with it and n - 1 without.
    """
    rows = [Generation(sampler.settings) for _ in prompts]
    active = torch.arange(len(rows), device=session.device)
    chosen = sampler.sample_tokens(session.prefill(prompts)[:, None], active)
    while True:
        for row, token in zip(active.tolist(), chosen[:, 0].tolist(), strict=True):
            rows[row].extend([token], [session.calls(row)])
        running = torch.tensor([not rows[row].finished for row in active.tolist()], device=session.device)
        active, chosen = active[running], chosen[running]
        if not len(active):
            return rows
        logits = session.forward(chosen, active, "decode", causal=True)
        session.commit(active, 1)
        chosen = sampler.sample_tokens(logits[:, -1:], active)
