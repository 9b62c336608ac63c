"""What decoding is asked for and what it returns."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from nemodiff_train.errors import UserError


@dataclass(frozen=True, kw_only=True)
class DecodingSettings:
    """How to decode; greedy in every mode."""

    max_new_tokens: int = 512
    """Exact limit on the new tokens of a row, the stop token included."""
    block_size: int = 32
    """Places of a diffusion block, and of a draft (its known first place included)."""
    threshold: float = 0.9
    """Block diffusion commits every place whose probability reaches this, and always the best one."""
    stop_token_ids: frozenset[int] = frozenset()
    """A row ends with the first of these; it is part of the output."""

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise UserError(f"max new tokens is {self.max_new_tokens}; it must be at least 1")
        if self.block_size < 2:
            raise UserError(f"block size is {self.block_size}; a block needs at least 2 places")
        if not 0 <= self.threshold <= 1:
            raise UserError(f"threshold is {self.threshold}; it is a probability between 0 and 1")


@dataclass
class Generation:
    """The new tokens of one row and how they came about."""

    settings: DecodingSettings
    tokens: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)
    """Tokens that each draft + verify cycle committed, its bonus token included."""
    agreed: list[list[bool]] = field(default_factory=list)
    """For each cycle and each drafted place, whether the verifier would have chosen the same token."""
    drafts: list[list[int]] = field(default_factory=list)
    """For each cycle, the tokens that were drafted, rejected ones included."""
    steps: list[int] = field(default_factory=list)
    """For each token, which of the row's forwards (counted from 1) settled it."""
    finished: bool = False

    def extend(self, tokens: Sequence[int], steps: Sequence[int]) -> int:
        """Append tokens, and the forwards that settled them, until the stop token or the limit.

        Returns:
            How many were taken; ``finished`` tells whether more may follow.
        """
        for taken, (token, step) in enumerate(zip(tokens, steps, strict=True), start=1):
            self.tokens.append(token)
            self.steps.append(step)
            self.finished = token in self.settings.stop_token_ids or len(self.tokens) >= self.settings.max_new_tokens
            if self.finished:
                return taken
        return len(tokens)
