"""The features of each slot of a block for the trained sampler: from the forward's logits, and from those before."""

from collections.abc import Mapping

import torch
from torch import Tensor

TOP = 8
"""Most probable tokens whose probabilities are features."""
_LARGEST = 16.0
"""Bound on log-odds and minus log-probabilities: fp32 resolves no probability closer to 1."""

FEATURES: Mapping[str, str] = {
    "masked": "1 where the slot is masked; where it is not, features of its token are 0",
    "log_odds": "log p / (1 - p) of the slot's token, divided by 8",
    "probability": "p",
    **{f"top_{rank}": f"log p of the rank-{rank} token, divided by 8" for rank in range(1, TOP + 1)},
    "margin": "probability of the most probable token less that of the next",
    "entropy": "nats",
    "is_top": "1 where the token is the most probable one: 0 only where it was drawn",
    "left_agrees": "probability that the slot to the left gives to this slot's token; 0 or 1 where it is unmasked",
    "right_agrees": "the same of the slot to the right",
    "left_correct_probability": "product of the probabilities of the masked slots to the left",
    "unchanged": "1 where the forward before gave the same token",
    "repeats": "forwards in a row that have given the token, divided by 8, at most 1",
    "log_odds_change": "log-odds less those of the forward before, divided by 8",
    "inverse_age": "of an unmasked slot, 1 / forwards since it was unmasked; 0 for what was known from the start",
    "slot": "index in the block, divided by its length",
    "to_left": "slots to the next unmasked one on the left, divided by the block's length; 1 without one",
    "to_right": "the same on the right",
    "masked_fraction": "masked slots of the block, divided by its length",
    "just_unmasked": "slots that the forward before unmasked, divided by the block's length",
    "forwards": "1 / (1 + forwards that the block has had)",
}
"""Name and meaning of each feature, in order; logarithms are natural."""


class SlotHistory:
    """The slots of a batch of blocks over their forwards.

    Args:
        blocks: [batch, block] token ids; their shape and device.
    """

    def __init__(self, blocks: Tensor) -> None:
        self._tokens = torch.full_like(blocks, -1)
        self._log_odds = torch.zeros(blocks.shape, device=blocks.device)
        self._repeats = torch.zeros_like(blocks)
        self._unmasked_by = torch.zeros_like(blocks)  # 0 for what was known from the start
        self._forwards = torch.zeros_like(blocks[:, 0])

    def observe(self, rows: Tensor, logits: Tensor, tokens: Tensor, blocks: Tensor, masked: Tensor) -> Tensor:
        """Return the features of some rows after one more forward of each, and keep what their next ones need.

        Args:
            rows: [rows] indices in the batch.
            logits: [rows, block, vocab] fp32 of the forward.
            tokens: [rows, block] token that each slot would be given.
            blocks: [rows, block] tokens that the forward has read.
            masked: [rows, block] boolean: which of them are masks.

        Returns:
            [rows, block, len(FEATURES)] fp32.
        """
        size = masked.shape[1]
        # Log probabilities [rows, block, vocab]; the largest ones [rows, block, TOP]; each token's own, and log-odds.
        log_probs = logits.log_softmax(-1)
        top = log_probs.topk(TOP).values
        log_p = log_probs.gather(-1, tokens[..., None])[..., 0]
        log_odds = (log_p - (-log_p.expm1()).clamp(min=1e-38).log()).clamp(-_LARGEST, _LARGEST)
        # How each slot's token and state have changed over the forwards, [rows, block].
        unchanged = tokens == self._tokens[rows]
        repeats = torch.where(unchanged, self._repeats[rows] + 1, 1)
        forwards, unmasked_by = self._forwards[rows, None], self._unmasked_by[rows]
        age = forwards + 1 - unmasked_by
        left, right = _agreement(log_probs, tokens, blocks, masked)
        of_token = {
            "log_odds": log_odds / 8,
            "probability": log_p.exp(),
            **{f"top_{rank}": top[..., rank - 1].clamp(min=-_LARGEST) / 8 for rank in range(1, TOP + 1)},
            "margin": top[..., 0].exp() - top[..., 1].exp(),
            "entropy": -(log_probs.exp() * log_probs.clamp(min=-1e9)).sum(-1),  # 0 x -inf is 0 here
            "is_top": log_p == top[..., 0],
            "left_agrees": left,
            "right_agrees": right,
            "unchanged": unchanged,
            "repeats": (repeats / 8).clamp(max=1),
            "log_odds_change": torch.where(forwards > 0, log_odds - self._log_odds[rows], 0) / 8,
        }
        # Sum [rows, block] of the log probabilities of the masked slots to the left.
        before = (log_p * masked).cumsum(1) - log_p * masked
        of_block = {
            "masked": masked,
            "left_correct_probability": before.exp(),
            "inverse_age": torch.where(~masked & (unmasked_by > 0), 1 / age.clamp(min=1), 0),
            "slot": torch.arange(size, device=masked.device) / size,
            "to_left": _distance(masked) / size,
            "to_right": _distance(masked.flip(1)).flip(1) / size,
            "masked_fraction": masked.float().mean(1, keepdim=True),
            "just_unmasked": ((unmasked_by == forwards) & (unmasked_by > 0) & ~masked).float().mean(1, keepdim=True),
            "forwards": 1 / (1 + forwards),
        }
        self._tokens[rows], self._log_odds[rows], self._repeats[rows] = tokens, log_odds, repeats
        self._forwards[rows] += 1
        self._unmasked_by[rows] = torch.where(masked, self._forwards[rows, None], unmasked_by)
        values = {name: value * masked for name, value in of_token.items()} | of_block
        return torch.stack([values[name].float().expand(masked.shape) for name in FEATURES], dim=-1)


def _agreement(log_probs: Tensor, tokens: Tensor, blocks: Tensor, masked: Tensor) -> tuple[Tensor, Tensor]:
    """Return the probabilities [rows, block] that the slots to the left and to the right give to a slot's token."""
    sides = []
    for here, there in ((slice(1, None), slice(None, -1)), (slice(None, -1), slice(1, None))):
        # A masked neighbour gives its probability of the token, a known one 0 or 1.
        guessed = log_probs[:, there].gather(-1, tokens[:, here, None])[..., 0].exp()
        known = (blocks[:, there] == tokens[:, here]).float()
        side = torch.zeros(masked.shape, device=masked.device)
        side[:, here] = torch.where(masked[:, there], guessed, known)
        sides.append(side)
    return sides[0], sides[1]


def _distance(masked: Tensor) -> Tensor:
    """Return how many slots [rows, block] back the last unmasked one is; the block's length where there is none."""
    # Index [rows, block] of the last unmasked slot up to each, -1 without one.
    index = torch.arange(masked.shape[1], device=masked.device).expand(masked.shape)
    last = torch.where(masked, -1, index).cummax(1).values
    return torch.where(last < 0, masked.shape[1], index - last)
