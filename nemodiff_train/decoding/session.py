"""The session: a batch of rows, their cache, and every forward counted where the model is called."""

import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from nemodiff_train.attention.cache import DecodeBatch, KeyValueCache
from nemodiff_train.decoding.pipeline import PipelineRunner
from nemodiff_train.errors import UserError

Kind = Literal["prefill", "decode", "denoise", "commit", "draft", "verify", "fused", "search"]

# Forwards that fill masks: place i predicts token i, which a model trained with the shift says one place earlier.
FILLS = ("denoise", "draft", "search")

# A prefill of more tokens is split by rows. At this many, a GPU's matrix units are busy with the largest models.
PREFILL_TOKENS = 2048


class Layout(NamedTuple):
    """New tokens that are not simply one behind the other."""

    offsets: Tensor
    """[batch or 1, new] position of each, from the first one behind the committed tokens."""
    sees: Tensor
    """[batch or 1, new, new] which of them each sees."""


class Session:
    """Decodes a batch of rows of different lengths with one model.

    A forward takes new tokens for some rows and attends to what those rows have committed, either
    causally or as one bidirectional block.  Its keys and values stay only where :meth:`commit` says so.

    Args:
        model: A Megatron GPT model made by ``TriModeModelProvider``, or this rank's model chunks in order.
        rows: Sequences decoded together.
        capacity: Most positions a row may reach, drafts included.
        mask_token_id: Never predicted; None when the model has no mask token.
    """

    def __init__(self, model: Any, rows: int, capacity: int, mask_token_id: int | None) -> None:
        self.model = PipelineRunner(model)
        self.device = self.model.device
        self.cache = KeyValueCache(self.model.layers, rows, capacity, self.device)
        self.mask_token_id = mask_token_id
        self.vocab_size: int = self.model.config.vocab_size
        self.forwards: list[Counter[str]] = [Counter() for _ in range(rows)]
        """Calls of the model that each row took part in, by kind."""
        self.seconds: dict[str, float] = defaultdict(float)
        """Time in the model by kind."""

    @torch.inference_mode()
    def forward(
        self,
        tokens: Tensor,
        rows: Tensor,
        kind: Kind,
        *,
        causal: bool = False,
        block_size: int | None = None,
        layout: Layout | None = None,
        places: Tensor | None = None,
    ) -> Tensor:
        """Run new tokens behind what their rows have committed.

        Args:
            tokens: [batch, new] token ids.
            rows: [batch] rows of the session they belong to, ascending.
            kind: What the call is counted as.
            causal: Causal attention among the new tokens; otherwise they see their whole block.
            block_size: Positions of a block; None where all new tokens are one.
            layout: Positions and attention of the new tokens, instead of the last two.
            places: [batch, k] of the new tokens whose logits are wanted; None for all.

        Returns:
            Logits [batch, k or new, vocab], fp32; the mask token's are -inf.  Those of place i predict token i + 1
            in a causal forward, token i in one that fills masks; in a block-causal prefill or commit, what
            the model was trained for.

        Raises:
            ValueError: A row would outgrow the session's capacity.
        """
        self._check_room(rows, tokens.shape[1])
        started = time.perf_counter()
        if layout is None:
            cached = DecodeBatch.consecutive(
                self.cache, rows, tokens.shape[1], 1 if causal else block_size or tokens.shape[1]
            )
        else:
            cached = DecodeBatch.from_layout(self.cache, rows, *layout)
        if kind == "draft":
            cached = replace(cached, is_draft=True)
        logits = self.model(tokens, cached, places)[..., : self.vocab_size].float()
        if kind in FILLS and not causal and self.model.config.shift:
            logits = logits.roll(1, dims=1)  # of a block's first place nobody asks: it is its seed
        if self.mask_token_id is not None:
            logits[..., self.mask_token_id] = float("-inf")
        self.seconds[kind] += time.perf_counter() - started
        for row in rows.tolist():
            self.forwards[row][kind] += 1
        return logits

    def calls(self, row: int) -> int:
        """Forwards that a row has taken part in so far."""
        return self.forwards[row].total()

    def commit(self, rows: Tensor, counts: Tensor | int) -> None:
        """Keep the first ``counts`` tokens of each row's last forward in the cache.

        Args:
            rows: [batch] rows.
            counts: [batch] tokens to keep, or one number for all.
        """
        self.cache.lengths[rows] += counts

    def prefill(self, prompts: Sequence[Sequence[int]], block_size: int | None = None) -> Tensor:
        """Commit every row's prompt, each in one forward.

        Rows of similar length go together, padded on the right, where none of their own places can see; as many
        as :data:`PREFILL_TOKENS` allows, so that activations stay small beside the cache.

        Args:
            block_size: For a block-causal forward, of which every prompt is a multiple; None for a causal one.

        Returns:
            Logits after each prompt's last token: [rows, vocab].
        """
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=self.device)
        last: dict[int, Tensor] = {}
        waiting = lengths.argsort(descending=True, stable=True)
        while len(waiting):
            longest = int(lengths[waiting[0]])
            taken = max(1, PREFILL_TOKENS // max(longest, 1))
            rows, waiting = waiting[:taken].sort().values, waiting[taken:]
            padded = torch.zeros(len(rows), longest, dtype=torch.long, device=self.device)
            for place, row in enumerate(rows.tolist()):
                padded[place, : lengths[row]] = torch.tensor(prompts[row])
            ends = (lengths[rows] - 1).clamp(min=0)[:, None]
            logits = self.forward(
                padded, rows, "prefill", causal=block_size is None, block_size=block_size, places=ends
            )
            self.commit(rows, lengths[rows])
            last.update(zip(rows.tolist(), logits[:, 0], strict=True))
        return torch.stack([last[row] for row in range(len(prompts))])

    def _check_room(self, rows: Tensor, new: int) -> None:
        needed = int(self.cache.lengths[rows].max()) + new
        if needed > self.cache.capacity:
            raise ValueError(f"a row needs {needed} positions; the session holds {self.cache.capacity}")


def check_prompts(prompts: Sequence[Sequence[int]]) -> None:
    """Refuse what no mode can decode.

    Raises:
        UserError: There is no prompt, or one is empty.
    """
    if not prompts:
        raise UserError("no prompts to decode")
    for number, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise UserError(f"prompt {number} has no tokens")
