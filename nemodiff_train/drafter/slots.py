"""The slots of training samples: which positions draft, in which drafts, and which of them decoding would reach."""

from dataclasses import dataclass

import torch
from torch import Tensor

from nemodiff_train.drafter.config import DrafterConfig
from nemodiff_train.objective.drafts import DraftKind
from nemodiff_train.runtime.memory import copied_to


@dataclass(frozen=True)
class Slots:
    """The drafts of whole samples of L tokens; every block is one."""

    exists: Tensor
    """[batch, L] whether a noisy position is a slot."""
    draft_position: Tensor
    """[batch, L] position of each slot in its draft, from 1."""
    start: Tensor
    """[batch, L] position at which each position's block begins."""

    @classmethod
    def from_segment_ids(cls, segment_ids: Tensor, kind: DraftKind, shifted: bool) -> "Slots":
        """Find the slots of some samples.

        Args:
            segment_ids: [batch, 3, L] of :class:`~nemodiff_train.objective.sample.SampleMaker`, or of conversations.
            kind: What drafts look like.
            shifted: Whether a position predicts the next token.
        """
        # Position [batch, L] at which each position's block begins, and its position in the block's draft.
        documents, blocks = segment_ids[:, 0].contiguous(), segment_ids[:, 1].contiguous()
        start = torch.searchsorted(blocks, blocks)
        draft_position = torch.arange(blocks.shape[1], device=blocks.device) - start + int(shifted)
        documents = torch.where(documents < 0, -1 - documents, documents)  # an answer's padding belongs to its text
        if not kind.known_token_in_block:  # a document's first block has no token before it to follow
            exists = start > torch.searchsorted(documents, documents)
        elif shifted:  # the block's last position would predict the next block's first token, which is known
            exists = torch.ones_like(blocks, dtype=torch.bool)
            exists[:, :-1] = blocks[:, 1:] == blocks[:, :-1]
            exists[:, -1] = False
        else:
            exists = draft_position > 0
        return cls(exists, draft_position, start)

    def copied_to(self, device: torch.device) -> "Slots":
        """Return the same on a device, which the host does not wait for."""
        return Slots(*(copied_to(device, values) for values in (self.exists, self.draft_position, self.start)))

    def reached(self, passed: Tensor) -> Tensor:
        """Return whether every earlier slot of a slot's draft has passed: [batch, L].

        Args:
            passed: [batch, L] whether each slot has.
        """
        # Failed slots before each position: as many as before its block, unless one of its draft has failed.
        failed = (self.exists & ~passed).long()
        before = failed.cumsum(1) - failed
        return self.exists & (before == before.gather(1, self.start))


@dataclass(frozen=True)
class SlotOutcomes:
    """Outcomes of the slots of whole samples."""

    weights: Tensor
    """[batch, L] weight of each slot's loss, fp32."""
    counted: Tensor
    """[batch, L] whether the slot counts."""
    accepted: Tensor
    """[batch, L] whether greedy decoding would have accepted the slot and all before it."""
    usable: Tensor
    """[batch, L] whether the data have a target there and at all slots before it."""

    @classmethod
    def from_acceptance(
        cls, slots: Slots, usable: Tensor, agrees: Tensor, accepted: Tensor, config: DrafterConfig
    ) -> "SlotOutcomes":
        """Find the slots of each draft that decoding would reach.

        Args:
            slots: The drafts.
            usable: [batch, L] whether the data have a target.
            agrees: [batch, L] whether the greedy draft is the verifier's choice.
            accepted: [batch, L] whether the draft, drawn or greedy, is.
            config: The switches.
        """
        usable = usable & slots.reached(usable)
        counted = usable & slots.reached(accepted) if config.slots == "visited" else usable
        weights = counted.float()
        if config.position_decay:
            weights = weights * torch.exp(-(slots.draft_position - 1) / config.position_decay)
        agrees = agrees & usable
        return cls(weights, counted, agrees & slots.reached(agrees), usable)
