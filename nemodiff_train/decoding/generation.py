"""The request and the result of decoding: settings, and the generation of one row."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal, Self, get_args

from nemodiff_train.errors import UserError, nearest

if TYPE_CHECKING:
    from nemodiff_train.sampler.storage import TrainedSampler

ForwardKind = Literal["prefill", "decode", "draft", "verify", "denoise", "commit", "fused", "search"]
"""Purpose of a call of the model. ``prefill``: the prompt, once. ``decode``: one autoregressive step. ``draft`` and
``verify``: linear and tree self-speculation. ``denoise``: one forward over a masked block. ``commit``: the forward
that writes a finished block to the cache. ``fused``: verification and the next drafts in one. ``search``: spent by an
oracle to find its path, never part of TPF."""

Policy = Literal["threshold", "entropy", "fixed", "leftmost", "trained"]

MIN_TEMPERATURE = 1e-4
"""Lowest temperature above 0; below it logits / temperature leaves the range of fp32."""

_MINIMUM = {
    "max_new_tokens": 1,
    "block_size": 2,
    "steps": 1,
    "search_budget": 1,
    "tree_nodes": 2,
    "tree_width": 1,
    "top_k": 0,
    "temperature": 0,
    "entropy_bound": 0,
    "seed": 0,
}


@dataclass(frozen=True, kw_only=True)
class DecodingSettings:
    """Settings of decoding.

    Raises:
        UserError: A value is out of its range.
    """

    max_new_tokens: int = 512
    """Exact limit on the new tokens of a row, the stop token included."""
    block_size: int = 32
    """Positions of a diffusion block, and of a draft with the known token before it."""
    temperature: float = 0.0
    """0 for greedy decoding; otherwise tokens are drawn from softmax(logits / temperature)."""
    top_k: int = 0
    """Draw from the k most probable tokens; 0 for all."""
    top_p: float = 1.0
    """Draw from the most probable tokens that together reach this probability."""
    seed: int = 0
    """Seed of the draws; each row of a task has its own stream."""
    policy: Policy = "threshold"
    """Positions of a block that a denoising forward unmasks, at least one. ``threshold``: those whose token reaches
    ``threshold``. ``leftmost``: the run of such positions from the left. ``entropy``: by rising entropy, as long as
    the entropies except the largest sum to at most ``entropy_bound`` (EB-Sampler, arXiv 2505.24857). ``fixed``: an
    even share, so that a block takes ``steps`` forwards. ``trained``: those whose confidence by
    ``trained_sampler`` reaches ``threshold``."""
    threshold: float = 0.9
    """Probability from which a position is unmasked."""
    trained_sampler: "TrainedSampler | None" = None
    """For ``policy=trained``, and only for it."""
    entropy_bound: float = 0.1
    """Nats, for ``policy=entropy``."""
    steps: int = 8
    """Denoising forwards per block, for ``policy=fixed``."""
    tree_nodes: int = 64
    """Positions that a forward of mode ``tree`` verifies, the last known token included."""
    tree_width: int = 8
    """Candidates for each position of the tree: the most probable tokens of the draft."""
    search_budget: int = 5000
    """Maximum number of forwards that ``oracle`` may spend per row; at least three per new token."""
    stop_token_ids: frozenset[int] = frozenset()
    """A row ends with the first of these; it is part of the output."""
    stop_strings: tuple[str, ...] = ()
    """A row ends when its text holds one of these; the text is cut before it."""
    detokenize: Callable[[list[int]], str] | None = None
    """Turns token ids into text, for ``stop_strings``."""
    detokenize_with_special: Callable[[list[int]], str] | None = None
    """Turns token ids into text with special tokens written out, which a stop string may hold; None where there are
    none."""
    on_commit: Callable[["Generation"], None] | None = None
    """Called with a row whenever tokens have been committed to it, after the forward that decided them."""

    def __post_init__(self) -> None:
        if self.policy not in get_args(Policy):
            known = ", ".join(get_args(Policy))
            raise UserError(
                f"unknown policy '{self.policy}'; known: {known}.{nearest(self.policy, get_args(Policy))}"
            )
        if self.trained_sampler is not None:
            self.trained_sampler.check_block_size(self.block_size)
        for name, minimum in _MINIMUM.items():
            value = getattr(self, name)
            if not minimum <= value < math.inf:
                finite = " and finite" if isinstance(value, float) else ""
                raise UserError(f"{name} is {value}; it must be at least {minimum}{finite}")
        if not 0 <= self.threshold <= 1:
            raise UserError(f"threshold is {self.threshold}; it is a probability between 0 and 1")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p is {self.top_p}; it is a probability above 0, at most 1")
        if 0 < self.temperature < MIN_TEMPERATURE:
            raise UserError(f"temperature is {self.temperature}; it must be 0 or at least {MIN_TEMPERATURE}")
        if self.seed >= 2**64:
            raise UserError(f"seed is {self.seed}; it must be below 2^64")
        if "" in self.stop_strings:
            raise UserError("stop_strings (--stop) has an empty text, which every text holds; give some text")

    def stopping_at(self, token: int | None) -> Self:
        """Return the settings with one more token that ends a row; None adds none."""
        return self if token is None else replace(self, stop_token_ids=self.stop_token_ids | {token})

    def text(self, tokens: Sequence[int]) -> str:
        """Return the text of new tokens, without special ones, cut before the first stop string."""
        assert self.detokenize is not None
        with_special, text = self.text_with_special(tokens), self.detokenize(list(tokens))
        end = self._first_stop(with_special)
        if end < 0:
            end = self._first_stop(text)
            return text if end < 0 else text[:end]
        if with_special[:end] == text[:end]:
            return text[:end]
        count = 0  # tokens that end before the stop string
        while len(self.text_with_special(tokens[: count + 1])) <= end:
            count += 1
        before = list(tokens[:count])
        return self.detokenize(before) + with_special[len(self.text_with_special(before)) : end]

    def text_with_special(self, tokens: Sequence[int]) -> str:
        """Return the text of tokens, special ones written out."""
        detokenize = self.detokenize_with_special or self.detokenize
        assert detokenize is not None
        return detokenize(list(tokens))

    def holds_stop(self, tokens: list[int]) -> bool:
        """Return whether the text of some tokens holds a stop string, special tokens included."""
        return self._first_stop(self.text_with_special(tokens)) >= 0

    def _first_stop(self, text: str) -> int:
        """Return where the first stop string begins, or -1."""
        return min((at for stop in self.stop_strings if (at := text.find(stop)) >= 0), default=-1)


@dataclass(frozen=True)
class Cycle:
    """One draft + verify cycle of self-speculation, in the words of vLLM's rejection sampler."""

    accepted: int
    """Draft tokens that were committed."""
    recovered: bool = False
    """Whether the verifier's own token at the first rejected position was committed after them."""
    bonus: bool = False
    """Whether the verifier's token after a wholly accepted draft was committed."""
    draft_tokens: list[int] = field(default_factory=list)
    """Token ids of the draft, rejected ones included; of a tree, the accepted branch and one rejected token."""
    accept_mask: list[bool] = field(default_factory=list)
    """For each draft token, whether it passed the test; positions after the first rejection are tested too."""
    accept_probs: list[float] = field(default_factory=list)
    """For each draft token, min(1, p/q) at temperature 1, with p of the verifier and q of the drafter; in a tree, p
    of all that it proposes for the position."""
    target_tokens: int = 0
    """Tokens that the draft's forward gave as the verifier's own, before the draft (``uno`` drafters: 1)."""

    @property
    def committed(self) -> int:
        """Return the number of tokens that the cycle added to the output."""
        return self.target_tokens + self.accepted + self.recovered + self.bonus


@dataclass
class Generation:
    """The new tokens of one row and how they came about."""

    settings: DecodingSettings
    tokens: list[int] = field(default_factory=list)
    cycles: list[Cycle] = field(default_factory=list)
    """Draft + verify cycles; the first token, which the prefill yields, belongs to none."""
    steps: list[int] = field(default_factory=list)
    """For each token, which of the row's forwards, counted from 1, determined it."""
    oracle_forwards: int | None = None
    """Denoising forwards of the shortest path that an oracle found; its search is counted apart."""
    finished: bool = False
    """Whether a stop or the limit was reached."""

    @property
    def remaining_tokens(self) -> int:
        """Return how many tokens may still follow."""
        return self.settings.max_new_tokens - len(self.tokens)

    def extend(self, tokens: Sequence[int], steps: Sequence[int]) -> int:
        """Append tokens until a stop or the limit.

        Args:
            tokens: Token ids.
            steps: For each, the forward that determined it.

        Returns:
            Number of tokens that were appended; ``finished`` tells whether more may follow.
        """
        before = len(self.tokens)
        for token, step in zip(tokens, steps, strict=True):
            self.tokens.append(token)
            self.steps.append(step)
            self.finished = (
                token in self.settings.stop_token_ids or self.remaining_tokens <= 0 or self._holds_stop_string()
            )
            if self.finished:
                break
        if self.settings.on_commit is not None:
            self.settings.on_commit(self)
        return len(self.tokens) - before

    def extend_by_cycle(
        self,
        tokens: Sequence[int],
        step: int,
        draft_tokens: list[int],
        accept_mask: list[bool],
        accept_probs: list[float],
        target_tokens: int = 0,
    ) -> None:
        """Append the tokens of one draft + verify cycle, and the cycle itself.

        Args:
            tokens: The accepted draft tokens, then the recovered or the bonus token.
            step: The forward that verified them.
            draft_tokens: See :class:`Cycle`.
            accept_mask: See :class:`Cycle`.
            accept_probs: See :class:`Cycle`.
            target_tokens: See :class:`Cycle`.
        """
        committed = self.extend(tokens, [step] * len(tokens))
        accepted = min(committed, len(tokens) - 1)  # a stop or the limit may cut the accepted tokens
        verifier_token, all_accepted = committed > accepted, all(accept_mask)
        self.cycles.append(
            Cycle(
                accepted=accepted,
                target_tokens=target_tokens,
                recovered=verifier_token and not all_accepted,
                bonus=verifier_token and all_accepted,
                draft_tokens=draft_tokens,
                accept_mask=accept_mask,
                accept_probs=accept_probs,
            )
        )

    def _holds_stop_string(self) -> bool:
        """Return whether the last token completed a stop string."""
        stops = self.settings.stop_strings
        if not stops:
            return False
        # A token has at least one byte and a character at most four, so this many tokens hold any new stop string.
        return self.settings.holds_stop(self.tokens[-4 * max(map(len, stops)) :])
