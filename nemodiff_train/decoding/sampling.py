"""From logits to tokens: greedy, or sampled with one generator per row; and the rejection sampling of drafts."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from nemodiff_train.decoding.generation import DecodingSettings


class TokenSampler:
    """Chooses tokens for the rows of one batch.

    A row's draws are a function of the seed and of its number in the task; they do not depend on the batch in
    which it is decoded.

    Args:
        settings: Temperature, top-k, top-p and seed.
        request_ids: Number of each row in the task.
    """

    def __init__(self, settings: DecodingSettings, request_ids: Sequence[int]) -> None:
        self.settings = settings
        self.greedy = settings.temperature == 0
        keys = [np.array([settings.seed, request_id], dtype=np.uint64) for request_id in request_ids]
        self._generators = [np.random.Generator(np.random.Philox(key=key)) for key in keys]

    def sample_tokens(self, logits: Tensor, rows: Tensor) -> Tensor:
        """Choose a token at every position.

        Args:
            logits: [batch, positions, vocab] fp32.
            rows: [batch] rows of the batch that they belong to, on the host.

        Returns:
            [batch, positions] token ids.
        """
        return logits.argmax(-1) if self.greedy else self.draw(self.distribution(logits), rows)

    def distribution(self, logits: Tensor) -> Tensor:
        """Return probabilities after temperature, top-k and top-p, one-hot when greedy.

        Args:
            logits: [batch, positions, vocab] fp32.

        Returns:
            [batch, positions, vocab] in the dtype of the logits.
        """
        if self.greedy:
            return F.one_hot(logits.argmax(-1), logits.shape[-1]).to(logits.dtype)
        logits = logits / self.settings.temperature
        if self.settings.top_k:
            # [batch, positions, 1] the smallest logit that is kept.
            smallest = logits.topk(min(self.settings.top_k, logits.shape[-1])).values[..., -1:]
            logits = logits.masked_fill(logits < smallest, -torch.inf)
        probs = logits.softmax(-1)
        if self.settings.top_p < 1:
            # Drop a token where those before it already reach top_p; the one that crosses the bound stays.
            descending, order = probs.sort(-1, descending=True)
            dropped = descending.cumsum(-1) - descending >= self.settings.top_p
            dropped = torch.zeros_like(dropped).scatter(-1, order, dropped)
            probs = probs.masked_fill(dropped, 0.0)
        return probs / probs.sum(-1, keepdim=True)

    def draw(self, weights: Tensor, rows: Tensor) -> Tensor:
        """Draw a token at every position with probability proportional to its weight.

        Args:
            weights: [batch, positions, vocab], not negative, none all zero.
            rows: [batch] rows of the batch that they belong to, on the host.

        Returns:
            [batch, positions] token ids.
        """
        # Invert the cumulative distribution in fp64: the first token whose cumulative weight exceeds u * total.
        cumulative = weights.double().cumsum(-1)
        threshold = self.uniform(rows, weights.shape[1], weights.device)[..., None] * cumulative[..., -1:]
        return torch.searchsorted(cumulative, threshold, right=True)[..., 0].clamp(max=weights.shape[-1] - 1)

    def uniform(self, rows: Tensor, positions: int, device: torch.device) -> Tensor:
        """Return [batch, positions] fp64 numbers in [0, 1), from each row's own generator."""
        draws = [self._generators[row].random(positions) for row in rows.tolist()]
        return torch.from_numpy(np.stack(draws)).to(device)


class Verification(NamedTuple):
    """Result of rejection sampling over one draft per row."""

    draft_tokens: Tensor
    """[batch, k] what was verified."""
    accept_mask: Tensor
    """[batch, k] boolean: whether each draft token passed the test; positions after a rejection are tested too."""
    accepted: Tensor
    """[batch] number of draft tokens before the first rejection."""
    tokens: Tensor
    """[batch, k + 1] token ids: the ``accepted`` draft tokens, then the recovered or the bonus token. Later ones are
    not valid."""
    accept_probs: Tensor
    """[batch, k] min(1, p/q) of each draft token at temperature 1: introspective acceptance."""

    def on_host(self) -> "Verification":
        """Return a copy on the host, for which the device is waited for once."""
        # Token ids are exact in fp64.
        columns = [column.unflatten(0, (len(column), -1)).flatten(1).double() for column in self]
        parts = torch.cat(columns, dim=1).cpu().split([part.shape[1] for part in columns], dim=1)
        return Verification(*(part.to(of.dtype).view(of.shape) for part, of in zip(parts, self, strict=True)))


def rejection_sample(
    sampler: TokenSampler, draft_tokens: Tensor, draft_logits: Tensor, target_logits: Tensor, rows: Tensor
) -> Verification:
    """Verify a draft by speculative decoding's rejection sampling (arXiv 2211.17192, algorithm 1).

    With target probabilities p and draft probabilities q, a draft token is accepted with probability min(1, p/q).
    At the first rejection a recovered token is drawn from max(p - q, 0) instead, and after a wholly accepted draft a
    bonus token from p.  So what is emitted is distributed as if every token had been drawn from p; at temperature 0
    it is the target's greedy choice.

    Args:
        sampler: Makes p and q of the logits.
        draft_tokens: [batch, k] tokens drawn from q.
        draft_logits: [batch, k, vocab] of q.
        target_logits: [batch, k + 1, vocab] of p, at each draft token and after the last.
        rows: [batch] rows of the batch, on the host.

    Returns:
        The tokens to emit, and what was accepted.
    """
    accept_probs = _accept_probs(target_logits[:, :-1].softmax(-1), draft_logits.softmax(-1), draft_tokens)
    if sampler.greedy:
        tokens = target_logits.argmax(-1)
        accept_mask = tokens[:, :-1] == draft_tokens
        return Verification(draft_tokens, accept_mask, _leading(accept_mask), tokens, accept_probs)
    target_probs, draft_probs = sampler.distribution(target_logits), sampler.distribution(draft_logits)
    bonus_probs, target_probs = target_probs[:, -1:], target_probs[:, :-1]
    # Accept with probability min(1, p/q): [batch, k].
    ratio = _accept_probs(target_probs, draft_probs, draft_tokens)
    accept_mask = sampler.uniform(rows, ratio.shape[1], ratio.device) < ratio
    # Residual distribution [batch, k, vocab]; where p = q it is empty, but there every token is accepted.
    recovered_probs = (target_probs - draft_probs).clamp(min=0)
    recovered_probs = torch.where(recovered_probs.sum(-1, keepdim=True) > 0, recovered_probs, target_probs)
    # [batch, k + 1] a recovered token per position and the bonus token; the first rejection ends what is valid.
    verifier_tokens = sampler.draw(torch.cat([recovered_probs, bonus_probs], dim=1), rows)
    accepted_or_recovered = torch.where(accept_mask, draft_tokens, verifier_tokens[:, :-1])
    tokens = torch.cat([accepted_or_recovered, verifier_tokens[:, -1:]], dim=1)
    return Verification(draft_tokens, accept_mask, _leading(accept_mask), tokens, accept_probs)


def _accept_probs(target_probs: Tensor, draft_probs: Tensor, draft_tokens: Tensor) -> Tensor:
    """Return [batch, k] min(1, p/q) of the draft tokens."""
    index = draft_tokens[..., None]
    p, q = target_probs.gather(-1, index), draft_probs.gather(-1, index)
    return (p / q.clamp(min=1e-38))[..., 0].clamp(max=1)


def _leading(accept_mask: Tensor) -> Tensor:
    """Return [batch] the length of the run of accepted tokens at the start of each draft."""
    return accept_mask.long().cumprod(1).sum(1)
