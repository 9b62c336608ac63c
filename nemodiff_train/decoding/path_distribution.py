"""A draft whose tokens depend on one another: its candidates, and the path that a selector takes among them."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from nemodiff_train.decoding.sampling import TokenSampler
from nemodiff_train.model.path_selector import CANDIDATES, HISTORY, SelectorTables


@dataclass(frozen=True)
class PathDistribution:
    """The distribution q of each drafted token, given those before it, over K candidates.

    The history before a draft is its last known token, repeated.
    """

    vocab_size: int
    candidates: Tensor
    """[batch, k, K] token ids, the most probable first."""
    scores: Tensor
    """[batch, k, K] logits of the draft itself."""
    contexts: Tensor
    """[batch, k, rank] factors of the draft's states."""
    before: Tensor
    """[HISTORY, vocabulary, rank] factors of the tokens before a drafted one."""
    after: Tensor
    """[batch, k, K, rank] factors of the candidates."""

    @classmethod
    def from_draft(cls, tables: SelectorTables, logits: Tensor, contexts: Tensor) -> "PathDistribution":
        """Take the candidates of a draft.

        Args:
            tables: The path selector.
            logits: [batch, k, vocab] of the drafted positions.
            contexts: [batch, k, rank] of the same.
        """
        scores, candidates = logits.topk(min(CANDIDATES, logits.shape[-1]), dim=-1)
        return cls(logits.shape[-1], candidates, scores, contexts, tables.before, tables.after[candidates])

    def logits(self, position: int, histories: Tensor) -> Tensor:
        """Return the logits [batch, n, K] of the candidates at a drafted position.

        Args:
            position: Index of the position in the draft.
            histories: [batch, n, HISTORY] tokens before it, the nearest first.
        """
        # Keys [batch, n, rank] of the state and the tokens before it; the candidates' factors [batch, K, rank].
        keys = self.contexts[:, position, None]
        for tokens, table in zip(histories.unbind(-1), self.before, strict=True):
            keys = keys + table[tokens]
        return self.scores[:, position, None] + F.silu(keys) @ self.after[:, position].mT

    def sample_path(self, sampler: TokenSampler, last: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Sample the tokens of a path one after another from q, given those before.

        Args:
            sampler: Takes the most probable one, or draws.
            last: [batch, 1] the known token before the draft.
            rows: [batch] rows of the batch, on the host.

        Returns:
            [batch, k] token ids; and the logits [batch, k, vocab] that they are from, -inf off the candidates.
        """
        history, path, path_logits = initial_history(last), [], []
        for position, candidates in enumerate(self.candidates.unbind(1)):
            # Logits [batch, 1, vocab] of the next token, from those of its candidates [batch, K].
            logits = last.new_full((len(last), 1, self.vocab_size), -torch.inf, dtype=self.scores.dtype)
            logits.scatter_(-1, candidates[:, None], self.logits(position, history))
            path.append(sampler.sample_tokens(logits, rows))
            path_logits.append(logits)
            history = appended(history, path[-1])
        return torch.cat(path, dim=1), torch.cat(path_logits, dim=1)


def initial_history(last: Tensor) -> Tensor:
    """Return the history [batch, 1, HISTORY] of a draft's first token, after the known one, [batch, 1]."""
    return last[..., None].expand(-1, -1, HISTORY)


def appended(histories: Tensor, tokens: Tensor) -> Tensor:
    """Return histories [batch, n, HISTORY] after one more token each, [batch, n]."""
    return torch.cat([tokens[..., None], histories[..., :-1]], dim=-1)
