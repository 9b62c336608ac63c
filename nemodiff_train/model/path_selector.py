"""The path selector: how well tokens go together that a draft proposes for neighbouring positions."""

from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.models.gpt import GPTModel
from torch import Tensor, nn

CANDIDATES = 16
"""Most probable tokens of a drafted position that a path is chosen from."""
HISTORY = 5
"""Tokens before a drafted one that its choice depends on."""
LARGEST_RANK = 16_384
"""More than any model has hidden dimensions."""


class PathSelector(nn.Module):
    """Low-rank scores of a drafted token given the tokens before it, after DFlash 2 (Inco AI, 2026).

    A parallel draft chooses the token of each position without knowing its neighbours.  Given the tokens a_1, a_2,
    ... before it, the nearest first, the logit of a candidate b becomes::

        draft logit(b) + <silu(A_1 e(a_1) + A_2 e(a_2) + ... + G h), B e(b)>

    with e(t) the row of the model's output layer for token t, and h the draft's final state at b's position, both
    scaled to a root mean square of 1.  DFlash 2 scores neighbouring pairs alone, <(A e(a)) * (G h), B e(b)>.  B
    starts at zero: an untrained selector changes nothing.

    Args:
        hidden: The model's hidden size.
        rank: Inner dimension.
        like: A weight of the model, whose device and dtype it gets.
    """

    def __init__(self, hidden: int, rank: int, like: Tensor) -> None:
        super().__init__()
        # The same on every rank.
        draw = np.random.default_rng(0).standard_normal((HISTORY, rank, hidden)) / hidden**0.5
        self.before = nn.Parameter(torch.from_numpy(draw).to(device=like.device, dtype=like.dtype))
        """A_1, A_2, ...: [HISTORY, rank, hidden]."""
        self.context = nn.Parameter(torch.zeros_like(self.before[0]))
        """G: [rank, hidden]."""
        self.after = nn.Parameter(torch.zeros_like(self.before[0]))
        """B: [rank, hidden]."""

    def forward(self, previous: Tensor, candidates: Tensor, states: Tensor) -> Tensor:
        """Return what the tokens before add to the logits of candidates: [..., candidates] fp32.

        Args:
            previous: [..., HISTORY, hidden] rows of the output layer of the tokens before, the nearest first.
            candidates: [..., candidates, hidden] those of the candidates.
            states: [..., hidden] final states of the draft at the candidates' positions.
        """
        # [..., rank] key: G h and the sum of A_i e(a_i); then its product with B e(b) per candidate.
        key = self.contexts(states)
        for token, matrix in zip(previous.unbind(-2), self.before, strict=True):
            key = key + project(token, matrix)
        return (project(candidates, self.after) @ F.silu(key)[..., None])[..., 0].float()

    def contexts(self, states: Tensor) -> Tensor:
        """Return G h of final states [..., hidden]: [..., rank]."""
        return project(states, self.context)


def project(values: Tensor, matrix: Tensor) -> Tensor:
    """Return [..., rank] products of rows or states [..., hidden], scaled to a root mean square of 1."""
    normal = F.rms_norm(values.float(), values.shape[-1:], eps=1e-6)
    return normal.to(matrix.dtype) @ matrix.T


@dataclass(frozen=True)
class SelectorTables:
    """Contributions of every token to the scores of a path selector, computed once for decoding; on every rank."""

    before: Tensor
    """[HISTORY, vocabulary, rank] A_i e(t) of every token t, fp32."""
    after: Tensor
    """[vocabulary, rank] B e(t), fp32."""

    @property
    def rank(self) -> int:
        """Return the inner dimension of the scores."""
        return self.after.shape[1]

    @classmethod
    def from_model(cls, chunks: list[GPTModel], rank: int) -> "SelectorTables":
        """Compute them from a loaded model; every rank of it calls this.

        Args:
            chunks: This pipeline rank's chunks; the last stage's has the selector, as ``selector``.
            rank: Inner dimension of the selector.
        """
        last, tensor, pipeline = chunks[-1], chunks[-1].pg_collection.tp, chunks[-1].pg_collection.pp
        tables = torch.empty(HISTORY + 1, last.vocab_size, rank, device=next(last.parameters()).device)
        if last.post_process:
            rows = last.shared_embedding_or_output_weight() if last.share_embeddings_and_output_weights else None
            rows = last.output_layer.weight if rows is None else rows
            selector: PathSelector = last.selector
            # [HISTORY + 1, vocabulary / tensor-parallel size, rank], gathered to [HISTORY + 1, vocabulary, rank].
            with torch.no_grad():
                local = torch.stack([project(rows, matrix) for matrix in (*selector.before, selector.after)])
            parts = [torch.empty_like(local, dtype=torch.float32) for _ in range(tensor.size())]
            dist.all_gather(parts, local.float().contiguous(), group=tensor)
            tables = torch.cat(parts, dim=1)
        if pipeline.size() > 1:
            dist.broadcast(tables, dist.get_global_rank(pipeline, pipeline.size() - 1), pipeline)
        return cls(tables[:-1], tables[-1])
