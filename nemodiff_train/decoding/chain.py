"""A draft whose tokens depend on one another: candidates, scored in pairs by a path selector, and their paths."""

from dataclasses import dataclass

import torch
from torch import Tensor

from nemodiff_train.decoding.sampling import Sampler
from nemodiff_train.model.path_selector import CANDIDATES, PairTables


@dataclass(frozen=True)
class Chain:
    """The distribution q(b | a) of each drafted token b, given the token a before it, over K candidates."""

    vocab_size: int
    candidates: Tensor
    """[batch, k, K] token ids, the most probable first."""
    scores: Tensor
    """[batch, k, K] logits of the draft itself."""
    before: Tensor
    """[vocabulary, rank] the first factor of every token."""
    after: Tensor
    """[batch, k, K, rank] the second factor of the candidates, times the gates of their positions."""

    @classmethod
    def of(cls, tables: PairTables, logits: Tensor, gates: Tensor) -> "Chain":
        """Take the candidates of a draft.

        Args:
            tables: The path selector.
            logits: [batch, k, vocab] of the drafted positions.
            gates: [batch, k, rank] of the same.
        """
        scores, candidates = logits.topk(min(CANDIDATES, logits.shape[-1]), dim=-1)
        return cls(logits.shape[-1], candidates, scores, tables.before, tables.after[candidates] * gates[:, :, None])

    def log_probs(self, last: Tensor, temperature: float = 1.0) -> Tensor:
        """Return [batch, k, K, K] log q of each candidate (last dimension), given each candidate before it.

        Args:
            last: [batch, 1] the known token, which the first position has before it, whatever the candidate.
            temperature: Of q.
        """
        first = self._logits(0, last[:, 0])[:, None, None].expand(-1, 1, self.scores.shape[2], -1)
        later = self.scores[:, 1:, None] + self.before[self.candidates[:, :-1]] @ self.after[:, 1:].mT
        return (torch.cat([first, later], dim=1) / temperature).log_softmax(-1)

    def best_path(self, last: Tensor) -> Tensor:
        """Return the path with the largest expected number of accepted tokens.

        Were the chain right about the verifier's choices x, a path's first j tokens would all be accepted with the
        probability prod_{i<=j} q(x_i | x_{i-1}); the sum over j is the expected number.  From the last position
        backwards, what can still be gained after candidate a is V(a) = max_b q(b | a) (1 + V(b)).

        Args:
            last: [batch, 1] the known token before the draft.

        Returns:
            [batch, k] token ids.
        """
        probs, value = self.log_probs(last).exp(), torch.zeros_like(self.scores[:, 0])
        choices: list[Tensor] = []  # [batch, K] the best candidate after each one, from the last position backwards
        for given in reversed(probs.unbind(1)):
            value, choice = (given * (1 + value[:, None])).max(-1)
            choices.append(choice)
        path = [torch.zeros_like(last)]  # the known token is before every candidate
        for choice in reversed(choices):
            path.append(choice.gather(1, path[-1]))
        return self.candidates.gather(2, torch.stack(path[1:], dim=1))[..., 0]

    def draw(self, sampler: Sampler, last: Tensor, rows: Tensor) -> Tensor:
        """Draw a path, each token from what the sampler makes of q given the one before.

        Args:
            sampler: Draws.
            last: [batch, 1] the known token before the draft.
            rows: [batch] rows of the batch, on the host.

        Returns:
            [batch, k] token ids.
        """
        path = [last]
        for position in range(self.scores.shape[1]):
            logits = self._spread(self._logits(position, path[-1][:, 0])[:, None], self.candidates[:, position, None])
            path.append(sampler.sample_tokens(logits, rows))
        return torch.cat(path[1:], dim=1)

    def logits(self, last: Tensor, path: Tensor) -> Tensor:
        """Return [batch, k, vocab] logits of q along a path, each given the token before; -inf off the candidates.

        Args:
            last: [batch, 1] the known token before the draft.
            path: [batch, k] token ids.
        """
        previous = torch.cat([last, path[:, :-1]], dim=1)
        logits = [self._logits(position, token) for position, token in enumerate(previous.unbind(1))]
        return self._spread(torch.stack(logits, dim=1), self.candidates)

    def _logits(self, position: int, previous: Tensor) -> Tensor:
        """Return [batch, K] logits of the candidates at a position after tokens [batch]."""
        return self.scores[:, position] + (self.after[:, position] @ self.before[previous][..., None])[..., 0]

    def _spread(self, logits: Tensor, candidates: Tensor) -> Tensor:
        """Return logits [batch, positions, K] of candidates as [batch, positions, vocab]."""
        everywhere = logits.new_full((*logits.shape[:2], self.vocab_size), -torch.inf)
        return everywhere.scatter(-1, candidates, logits)
