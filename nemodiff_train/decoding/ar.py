"""Autoregressive decoding: one token a forward."""

from collections.abc import Sequence

import torch

from nemodiff_train.decoding.generation import DecodingSettings, Generation
from nemodiff_train.decoding.session import Session


def decode_ar(session: Session, prompts: Sequence[Sequence[int]], settings: DecodingSettings) -> list[Generation]:
    """Prefill, then one causal forward a token, for every row that has not ended.

    The prefill predicts the first token, so n tokens cost n forwards with it and n - 1 without.
    """
    rows = [Generation(settings) for _ in prompts]
    chosen = session.prefill(prompts).argmax(-1)
    active = torch.arange(len(rows), device=session.device)
    while True:
        for row, token in zip(active.tolist(), chosen.tolist(), strict=True):
            rows[row].extend([token])
        running = torch.tensor([not rows[row].finished for row in active.tolist()], device=session.device)
        active, chosen = active[running], chosen[running]
        if not len(active):
            return rows
        logits = session.forward(chosen[:, None], active, "decode", causal=True)
        session.commit(active, 1)
        chosen = logits[:, -1].argmax(-1)
