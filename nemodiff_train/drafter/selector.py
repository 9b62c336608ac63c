"""The training of a path selector: teacher-forced on the drafts of a frozen drafter."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from nemodiff_train.drafter.config import DrafterConfig
from nemodiff_train.drafter.loss import NEVER, judge, slot_losses
from nemodiff_train.drafter.slots import Slots
from nemodiff_train.drafter.step import DraftLoss, Head, in_chunks
from nemodiff_train.model.path_selector import CANDIDATES, HISTORY, PathSelector


@dataclass(frozen=True, kw_only=True)
class SelectorLoss(DraftLoss):
    """The loss of a path selector, for the chain that it makes of a drafter's drafts.

    In a slot q is the chain's distribution of the token after the text's own ones, and p the verifier's, both on the
    draft's candidates and renormalized.  Slots where the verifier's choice is no candidate have no loss.
    """

    selector: PathSelector

    def _history(self, slots: Slots, shifted: bool) -> Tensor:
        """Return the text's tokens before the one that each position drafts, the nearest first: [batch, n, HISTORY].

        Those before the draft are all its known token, as decoding has them.
        """
        text = self.batch["tokens"][:, self.batch["maskable"].shape[1] :]
        tokens = [text if shifted else self.state.shard.before(text, self.state.context_group)]
        for _ in range(HISTORY - 1):
            tokens.append(self.state.shard.before(tokens[-1], self.state.context_group))
        within = (self._own(slots.number) - 1).clamp(min=0)[..., None]
        index = torch.arange(HISTORY, device=within.device).minimum(within)
        return torch.stack(tokens, dim=-1).gather(-1, index)

    def _judge(
        self, head: Head, drafts: Tensor, verifiers: Tensor, uniform: Tensor, previous: Tensor
    ) -> "JudgedChains":
        """Find out what becomes of each slot; the arguments are those of the base class."""
        parts: list[tuple[Tensor, ...]] = []
        with torch.no_grad():
            for draft, verifier, draw, before in in_chunks(drafts, verifiers, uniform, previous):
                q, p = head.logits(draft), head.logits(verifier)  # [slots, vocabulary]
                draft_logits, candidates = q.topk(min(CANDIDATES, q.shape[-1]), dim=-1)  # [slots, K]
                chain = draft_logits + self.selector(head.rows(before), head.rows(candidates), draft)
                outcome = judge(torch.full_like(q, NEVER).scatter_(-1, candidates, chain), p, draw, self.settings)
                among = (candidates == p.argmax(-1, keepdim=True)).any(-1)
                parts.append((*outcome, among, candidates, draft_logits, p.gather(-1, candidates)))
        outcomes = (torch.cat(parts) for parts in zip(*parts, strict=True))
        return JudgedChains(head, self.selector, self.settings, drafts.detach(), previous, *outcomes)


@dataclass(frozen=True)
class JudgedChains:
    """The slots of a path selector; a :class:`~nemodiff_train.drafter.step.Judged`."""

    head: Head
    selector: PathSelector
    settings: DrafterConfig
    drafts: Tensor
    """[S, hidden] states that draft."""
    previous: Tensor
    """[S, HISTORY] the text's tokens before each slot's."""
    agrees: Tensor
    accepted: Tensor
    has_loss: Tensor
    candidates: Tensor
    """[S, K] token ids."""
    draft_logits: Tensor
    """[S, K] logits of the draft."""
    verifier: Tensor
    """[S, K] logits of the verifier."""

    def total(self, weights: Tensor) -> Tensor:
        """Return the weighted sum of the losses; rows of the output layer are taken again in the backward pass."""
        slots = in_chunks(self.previous, self.candidates, self.drafts, self.draft_logits, self.verifier, weights)
        sums: list[Tensor] = [checkpoint(self._sum, *chunk, use_reentrant=False) for chunk in slots]
        return torch.stack(sums).sum()

    def _sum(
        self,
        previous: Tensor,
        candidates: Tensor,
        drafts: Tensor,
        draft_logits: Tensor,
        verifier: Tensor,
        weights: Tensor,
    ) -> Tensor:
        """Return the weighted sum of the losses of some slots."""
        chain = draft_logits + self.selector(self.head.rows(previous), self.head.rows(candidates), drafts)
        return (slot_losses(chain, verifier, self.settings) * weights).sum()
