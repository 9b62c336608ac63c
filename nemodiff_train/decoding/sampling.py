"""From logits to tokens: greedy, or sampled with a generator for each row."""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from nemodiff_train.decoding.generation import DecodingSettings


class Sampler:
    """Chooses tokens for the rows of one batch.

    A row's draws are a function of the seed and of its number in the task: they do not depend on the
    batch it happens to be decoded in.

    Args:
        settings: Temperature, top-k, top-p and seed.
        numbers: Number of each row in the task.
    """

    def __init__(self, settings: DecodingSettings, numbers: Sequence[int]) -> None:
        self.settings = settings
        self.greedy = settings.temperature == 0
        keys = [np.array([settings.seed, number], dtype=np.uint64) for number in numbers]
        self._generators = [np.random.Generator(np.random.Philox(key=key)) for key in keys]

    def sample_tokens(self, logits: Tensor, rows: Tensor) -> Tensor:
        """Choose a token at every place.

        Args:
            logits: [batch, places, vocab] fp32.
            rows: [batch] rows of the batch that they belong to.

        Returns:
            [batch, places] token ids.
        """
        return logits.argmax(-1) if self.greedy else self.draw(self.distribution(logits), rows)

    def distribution(self, logits: Tensor) -> Tensor:
        """Probabilities after temperature, top-k and top-p: [batch, places, vocab], one-hot when greedy."""
        if self.greedy:
            return F.one_hot(logits.argmax(-1), logits.shape[-1]).to(logits.dtype)
        logits = logits / self.settings.temperature
        if self.settings.top_k:
            least = logits.topk(min(self.settings.top_k, logits.shape[-1])).values[..., -1:]
            logits = logits.masked_fill(logits < least, -torch.inf)
        probabilities = logits.softmax(-1)
        if self.settings.top_p < 1:
            ordered, order = probabilities.sort(-1, descending=True)
            dropped = ordered.cumsum(-1) - ordered >= self.settings.top_p  # the one that crosses the bound stays
            dropped = torch.zeros_like(dropped).scatter(-1, order, dropped)
            probabilities = probabilities.masked_fill(dropped, 0.0)
        return probabilities / probabilities.sum(-1, keepdim=True)

    def draw(self, weights: Tensor, rows: Tensor) -> Tensor:
        """Draw a token at every place with probability proportional to its weight.

        Args:
            weights: [batch, places, vocab], not negative, none all zero.
            rows: [batch].
        """
        total = weights.double().cumsum(-1)
        target = self.uniform(rows, weights.shape[1])[..., None] * total[..., -1:]
        return torch.searchsorted(total, target, right=True)[..., 0].clamp(max=weights.shape[-1] - 1)

    def uniform(self, rows: Tensor, places: int) -> Tensor:
        """[batch, places] float64 in [0, 1), from each row's own generator."""
        drawn = [self._generators[row].random(places) for row in rows.tolist()]
        return torch.from_numpy(np.stack(drawn)).to(rows.device)


def verify(
    sampler: Sampler, draft: Tensor, draft_logits: Tensor, logits: Tensor, rows: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Speculative decoding's test of a draft (arXiv 2211.17192, algorithm 1).

    A drafted token is kept with probability min(1, p/q); at the first that is not, the token is drawn from
    max(p - q, 0) instead, and behind a draft that was kept throughout from p.  What is emitted is
    distributed as if every token had been drawn from p; at temperature 0 it is the greedy choice.

    Args:
        sampler: Makes p and q of the logits.
        draft: [batch, k] drafted tokens, drawn from q.
        draft_logits: [batch, k, vocab] of q.
        logits: [batch, k + 1, vocab] of p, the verifier's, for each drafted place and the one behind.
        rows: [batch].

    Returns:
        Whether each drafted token is kept [batch, k]; the tokens to emit [batch, k + 1], valid up to and
        including the first place that is not kept; and min(1, p/q) [batch, k] at temperature 1, the
        introspective acceptance.
    """
    acceptance = _ratio(logits[:, :-1].softmax(-1), draft_logits.softmax(-1), draft)
    if sampler.greedy:
        choice = logits.argmax(-1)
        return choice[:, :-1] == draft, choice, acceptance
    p, q = sampler.distribution(logits), sampler.distribution(draft_logits)
    kept = sampler.uniform(rows, draft.shape[1]) < _ratio(p[:, :-1], q, draft)
    rest = (p[:, :-1] - q).clamp(min=0)
    rest = torch.where(rest.sum(-1, keepdim=True) > 0, rest, p[:, :-1])  # p = q: nothing is ever refused
    instead = sampler.draw(torch.cat([rest, p[:, -1:]], dim=1), rows)
    emitted = torch.cat([torch.where(kept, draft, instead[:, :-1]), instead[:, -1:]], dim=1)
    return kept, emitted, acceptance


def _ratio(p: Tensor, q: Tensor, tokens: Tensor) -> Tensor:
    """[batch, k] min(1, p/q) at some tokens."""
    index = tokens[..., None]
    return (p.gather(-1, index) / q.gather(-1, index).clamp(min=1e-38))[..., 0].clamp(max=1)
