"""Kinds of drafts, one per kind of drafter."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class DraftKind:
    """The choices that tell one kind of drafter from another; training, decoding and export follow them."""

    uniform_noise: bool
    """Whether tokens drawn uniformly from the vocabulary stand for the unknown ones; else the mask token does."""
    causal: bool
    """Whether a position sees its block up to itself; else all of it."""
    known_token_in_block: bool
    """Whether the known token that a draft follows is its block's first and the adapters act on it.  Else it lies
    before the block and is the frozen model's: its logits are the verifier's own, and each position predicts the
    next token."""

    def shifted(self, shift: bool) -> bool:
        """Return whether a block's position i predicts token i + 1, for a model trained with or without the shift."""
        return shift or not self.known_token_in_block

    @property
    def target_tokens_per_cycle(self) -> int:
        """Return how many of a cycle's tokens are the verifier's own: the recovered or bonus one, and one before."""
        return 1 if self.known_token_in_block else 2


DRAFT_KINDS = {
    "nemotron": DraftKind(uniform_noise=False, causal=False, known_token_in_block=True),
    "uno": DraftKind(uniform_noise=True, causal=True, known_token_in_block=False),
}
"""``nemotron``: Nemotron-Labs-Diffusion (arXiv 2607.05722, section 3.3), for tri-mode models.  ``uno``: Uno (arXiv
2609.04010), for any autoregressive model."""
