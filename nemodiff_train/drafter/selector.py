"""The training of a path selector: teacher-forced on the drafts of a frozen drafter."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from nemodiff_train.drafter.loss import NEVER, simulate_acceptance, slot_losses
from nemodiff_train.drafter.slots import Slots
from nemodiff_train.drafter.step import DraftLoss, EvaluatedSlots, Head, LocalSlots, in_chunks
from nemodiff_train.model.path_selector import CANDIDATES, HISTORY, PathSelector


@dataclass(kw_only=True)
class SelectorLoss(DraftLoss):
    """The loss of a path selector, for the chain that it makes of a drafter's drafts.

    In a slot q is the chain's distribution of the token after the text's own ones, and p the verifier's, both on the
    draft's candidates and renormalized.  Slots where the verifier's choice is no candidate have no loss.
    """

    selector: PathSelector

    def _history(self, slots: Slots) -> Tensor:
        """Return the text's tokens before the one that each position drafts, the nearest first: [batch, n, HISTORY].

        Those before the draft are all its known token, as decoding has them.
        """
        tokens = [self.batch["tokens"][:, self.batch["maskable"].shape[1] :]]  # [batch, n] the text
        for _ in range(HISTORY - int(self.shifted)):
            tokens.append(self.state.shard.shift_right(tokens[-1], self.state.context_group))
        within = (self._local_positions(slots.draft_position) - 1).clamp(min=0)[..., None]
        index = torch.arange(HISTORY, device=within.device).minimum(within)
        return torch.stack(tokens[-HISTORY:], dim=-1).gather(-1, index)

    def _evaluate(self, head: Head, slots: LocalSlots) -> EvaluatedSlots:
        """Evaluate each slot."""
        previous = self._history(slots.of_samples).flatten(0, 1)[slots.index]  # [S, HISTORY]
        drafts, verifiers, uniform = slots.drafts, slots.verifiers, slots.uniform
        parts: list[tuple[Tensor, ...]] = []
        with torch.no_grad():
            for draft, verifier, draw, before in in_chunks(drafts, verifiers, uniform, previous):
                # Logits of the drafter and of the verifier p, [slots, vocabulary]; the candidates [slots, K].
                logits, p = head.logits(draft), head.logits(verifier)
                draft_logits, candidates = logits.topk(min(CANDIDATES, logits.shape[-1]), dim=-1)
                # Logits of the chain q: [slots, K], then [slots, vocabulary].
                chain = draft_logits + self.selector(head.rows(before), head.rows(candidates), draft)
                q = torch.full_like(logits, NEVER).scatter_(-1, candidates, chain)
                has_loss = (candidates == p.argmax(-1, keepdim=True)).any(-1)
                outcome = simulate_acceptance(q, p, draw, self.settings)
                parts.append((*outcome, has_loss, candidates, draft_logits, p.gather(-1, candidates)))
        agrees, accepted, has_loss, *of_slots = (torch.cat(column) for column in zip(*parts, strict=True))

        def chunk_total(
            draft: Tensor, before: Tensor, candidates: Tensor, draft_logits: Tensor, p: Tensor, weights: Tensor
        ) -> Tensor:
            chain = draft_logits + self.selector(head.rows(before), head.rows(candidates), draft)
            return (slot_losses(chain, p, self.settings) * weights).sum()

        def total(weights: Tensor) -> Tensor:
            chunks = in_chunks(drafts.detach(), previous, *of_slots, weights)
            # Rows of the output layer are taken again in the backward pass.
            sums: list[Tensor] = [checkpoint(chunk_total, *chunk, use_reentrant=False) for chunk in chunks]
            return torch.stack(sums).sum()

        return EvaluatedSlots(agrees, accepted, has_loss, total)
