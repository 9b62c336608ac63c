"""The session: a batch of rows, their cache, and every forward counted where the model is called."""

import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from megatron.core.models.gpt import GPTModel
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from nemodiff_train.attention.cache import DecodeBatch, KeyValueCache
from nemodiff_train.attention.kernels import without_cudnn_attention
from nemodiff_train.decoding.finite import check_finite
from nemodiff_train.decoding.generation import ForwardKind, Generation
from nemodiff_train.decoding.pipeline import PipelineRunner
from nemodiff_train.errors import UserError

# Forwards that fill masks: index i predicts the token at i, which a model trained with the shift says at i - 1.
MASK_FILLING: tuple[ForwardKind, ...] = ("denoise", "draft", "search")

# A prefill of more tokens is split by rows. At this many, a GPU's matrix units are busy with the largest models.
PREFILL_TOKENS = 2048


class TokenLayout(NamedTuple):
    """Positions and attention of new tokens that do not simply follow one another."""

    offsets: Tensor
    """[batch or 1, new] position of each, counted from the first one after the committed tokens."""
    can_attend: Tensor
    """[batch or 1, new, new] boolean: whether each of them attends to a new token (last dimension)."""
    offset_end: int
    """Exclusive upper bound of the offsets."""


class Session:
    """Decodes a batch of rows of different lengths with one model.

    A forward takes new tokens for some rows and attends to what those rows have committed, either causally or as
    one bidirectional block.  Its keys and values stay only where :meth:`commit` says so.

    Args:
        model: This pipeline rank's chunks of a Megatron GPT model made by ``TriModeModelProvider``, or the model.
        rows: Number of sequences decoded together.
        capacity: Maximum number of positions per row, drafts included.
        mask_token_id: Never predicted; None when the model has no mask token.
    """

    def __init__(self, model: GPTModel | list[GPTModel], rows: int, capacity: int, mask_token_id: int | None) -> None:
        self.model = PipelineRunner(model)
        self.device = self.model.device
        self.cache = KeyValueCache(self.model.layers, rows, capacity, self.device)
        self.mask_token_id = mask_token_id
        self.vocab_size: int = self.model.config.vocab_size
        self.selector_tables = self.model.selector_tables
        """The path selector of the model's drafter; None without one."""
        self.draft_kind = self.model.draft_kind
        """Kind of the drafts of the model's drafter; without one, of a tri-mode model's."""
        self.forwards: list[Counter[str]] = [Counter() for _ in range(rows)]
        """Calls of the model that each row took part in, by kind."""
        self.seconds: dict[str, float] = defaultdict(float)
        """Seconds in the model by kind."""

    @torch.inference_mode()
    def forward(
        self,
        tokens: Tensor,
        rows: Tensor,
        kind: ForwardKind,
        *,
        causal: bool = False,
        block_size: int | None = None,
        layout: TokenLayout | None = None,
        indices: Tensor | None = None,
    ) -> Tensor:
        """Run new tokens after those that their rows have committed.

        Args:
            tokens: [batch, new] token ids.
            rows: [batch] rows of the session they belong to, ascending; on the host.
            kind: Purpose that the call is counted under.
            causal: Causal attention among the new tokens; otherwise they see their whole block.
            block_size: Positions of a block; None where all new tokens are one block.
            layout: Positions and attention of the new tokens, instead of the last two.
            indices: [batch, k] indices of the new tokens whose logits are wanted; None for all.

        Returns:
            [batch, k or new, vocab] fp32 logits; the mask token's are -inf.  Index i predicts the token at i + 1 in a
            causal forward, at i in one that fills masks; in a block-causal prefill or commit, what the model was
            trained for.  In a draft forward of a model with a path selector, the contexts of its scores follow the
            logits: [batch, k or new, vocab + rank].

        Raises:
            NotFinite: Logits are infinite or not numbers.
            ValueError: A row would outgrow the session's capacity.
        """
        new = tokens.shape[1]
        needed = int(self.cache.lengths[rows].max()) + new
        if needed > self.cache.capacity:
            raise ValueError(f"a row needs {needed} positions; the session holds {self.cache.capacity}")
        started = time.perf_counter()
        if layout is None:
            batch = DecodeBatch.consecutive(self.cache, rows, new, 1 if causal else block_size or new)
        else:
            batch = DecodeBatch.from_layout(self.cache, rows, *layout)
        batch = replace(batch, is_draft=kind == "draft")
        with without_cudnn_attention():
            logits = self.model(tokens, batch, indices).float()
        # A path selector's contexts follow the logits: they decide on drafts alone, never on the text.
        check_finite(
            logits[..., : self.vocab_size], self.model.chunks, batch.positions,
            lambda: self.model(tokens, batch, indices)[..., : self.vocab_size],
        )  # fmt: skip
        if kind in MASK_FILLING and not causal and self.model.config.shift:
            logits = logits.roll(1, dims=1)  # a block's first index gets the last's, but it is known: never used
        if self.mask_token_id is not None:
            logits[..., self.mask_token_id] = float("-inf")
        self.seconds[kind] += time.perf_counter() - started
        for row in rows.tolist():
            self.forwards[row][kind] += 1
        return logits

    def calls(self, row: int) -> int:
        """Return the number of forwards that a row has taken part in so far."""
        return self.forwards[row].total()

    def emit(self, generations: Sequence[Generation], rows: Tensor, tokens: Tensor) -> None:
        """Append one token to each of some rows' generations, as what the last forward of the row determined.

        Args:
            generations: Of all rows of the session.
            rows: [batch] rows, on the host.
            tokens: [batch, 1] token ids.
        """
        for row, token in zip(rows.tolist(), tokens[:, 0].tolist(), strict=True):
            generations[row].extend([token], [self.calls(row)])

    def masks(self, rows: int, count: int) -> Tensor:
        """Return [rows, count] mask tokens."""
        assert self.mask_token_id is not None  # decode() refuses models without one
        return torch.full((rows, count), self.mask_token_id, device=self.device)

    def commit(self, rows: Tensor, counts: Tensor | int) -> None:
        """Keep the first tokens of each row's last forward in the cache.

        Args:
            rows: [batch] rows, on the host.
            counts: [batch] tokens to keep, on the host, or one number for all.
        """
        self.cache.lengths[rows] += counts

    @torch.inference_mode()
    def commit_nodes(self, rows: Tensor, kept: Sequence[Tensor]) -> None:
        """Keep some tokens of each row's last forward, one after another, and drop those between them.

        Args:
            rows: [batch] rows, on the host.
            kept: For each, the indices of its new tokens to keep, ascending; on the host.
        """
        self.cache.compact(rows, kept)
        self.commit(rows, torch.tensor([len(indices) for indices in kept]))

    def prefill(self, prompts: Sequence[Sequence[int]], block_size: int | None = None) -> Tensor:
        """Commit every row's prompt, each in one forward.

        Rows of similar length go together, padded on the right, where none of their tokens can see it; as many as
        :data:`PREFILL_TOKENS` allows, so that activations stay small beside the cache.

        Args:
            prompts: Token ids of each row.
            block_size: Block of a block-causal forward, which divides every prompt; None for a causal one.

        Returns:
            [rows, vocab] logits after each prompt's last token.
        """
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        last_logits: dict[int, Tensor] = {}
        waiting = lengths.argsort(descending=True, stable=True)
        while len(waiting):
            longest = int(lengths[waiting[0]])
            count = max(1, PREFILL_TOKENS // max(longest, 1))
            rows, waiting = waiting[:count].sort().values, waiting[count:]
            padded = pad_sequence([torch.tensor(prompts[row], dtype=torch.long) for row in rows], batch_first=True)
            tokens, last = (
                self.cache.to_device(padded),
                self.cache.to_device((lengths[rows] - 1).clamp(min=0)[:, None]),
            )
            causal = block_size is None
            logits = self.forward(tokens, rows, "prefill", causal=causal, block_size=block_size, indices=last)
            self.commit(rows, lengths[rows])
            last_logits.update(zip(rows.tolist(), logits[:, 0], strict=True))
        return torch.stack([last_logits[row] for row in range(len(prompts))])


def drop_finished(generations: Sequence[Generation], rows: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
    """Return the rows [batch] that have not ended, and their part of [batch, ...] values."""
    unfinished = torch.tensor([not generations[row].finished for row in rows.tolist()], dtype=torch.bool)
    return tuple(value[unfinished] for value in (rows, *values))


def check_prompts(prompts: Sequence[Sequence[int]], vocab_size: int) -> None:
    """Refuse prompts that no mode can decode.

    Args:
        prompts: Token ids of each.
        vocab_size: Rows of the model's embedding.

    Raises:
        UserError: There is no prompt, or one is empty or holds a token without a row.
    """
    if not prompts:
        raise UserError("no prompts to decode; give one at least")
    for number, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise UserError(f"prompt {number} has no tokens; give it some text, or leave it out")
        if (largest := max(prompt)) >= vocab_size:  # tensor-parallel ranks would embed it as zeros
            raise UserError(
                f"prompt {number} holds token {largest}, but the model has tokens 0 to {vocab_size - 1}; leave it out"
            )
