"""What the forward step trains a drafter on: drafts from the noisy half, their verification from the clean half.

Every block of a sample is a draft, of tokens that it does not know.  The noisy half has the adapters and drafts; the
clean half has none and is what AR decoding would say of the same text.  So one forward gives both, of many drafts at
once.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import ColumnParallelLinear
from torch import Tensor
from torch.autograd.function import FunctionCtx

from nemodiff_train.attention.context_parallel import ContextParallelShard
from nemodiff_train.attention.state import AttentionState
from nemodiff_train.drafter.config import DrafterConfig
from nemodiff_train.drafter.loss import NEVER, judge, slot_losses
from nemodiff_train.drafter.slots import Slots, Verdict
from nemodiff_train.model.head import DRAFT_CHUNK, gather_hidden_states
from nemodiff_train.model.provider import TriModeModelProvider
from nemodiff_train.objective.drafts import DraftKind
from nemodiff_train.objective.loss import Report, pair
from nemodiff_train.objective.noise import DRAFTS, generator
from nemodiff_train.objective.sample import Sample
from nemodiff_train.runtime.memory import copied_to

DRAFT_LENGTHS = (7, 15, 31)
"""Lengths of drafts whose acceptance length is reported, besides that of a whole block."""
POSITIONS = (1, 2, 4, 8, 16)
"""Positions in a draft, from 1, whose acceptance is reported."""


def draft_tokens(
    batch: Sample, model: TriModeModelProvider, kind: DraftKind, seed: int, shard: ContextParallelShard
) -> Tensor:
    """Return the ids [batch, 2L / size] of a rank: what stands for the tokens that drafts do not know, then the text.

    Args:
        batch: A micro-batch, this rank's positions of it.
        model: Its vocabulary, mask token and noise.
        kind: What drafts look like.
        seed: Seed of uniform noise, which follows from the samples' indices.
        shard: The rank.
    """
    clean = batch["tokens"][:, batch["maskable"].shape[1] :]
    blocks = batch["host_segment_ids"][:, 1]
    if kind.uniform_noise:
        draws = [generator(seed, DRAFTS, int(index)) for index in batch["index"].tolist()]
        noise = [torch.from_numpy(draw.integers(0, model.vocab_size, blocks.shape[1])) for draw in draws]
        noisy = copied_to(clean.device, shard.take(torch.stack(noise), blocks.shape[1]))
    else:
        assert model.mask_token_id is not None  # such a drafter is refused for a model that has none
        noisy = torch.full_like(clean, model.mask_token_id)
    if kind.seed_in_block:
        first = torch.ones_like(blocks, dtype=torch.bool)
        first[:, 1:] = blocks[:, 1:] != blocks[:, :-1]
        noisy = clean.where(copied_to(clean.device, shard.take(first, blocks.shape[1])), noisy)
    return torch.cat([noisy, clean], dim=1)


@dataclass(frozen=True)
class DraftLoss:
    """The drafter's loss of a micro-batch, in the place of the step's :class:`TriModeLoss`.

    A context-parallel rank has n = L / size of the positions and S of the slots of its samples.
    """

    batch: Sample
    settings: DrafterConfig
    model: TriModeModelProvider
    seed: int
    """Seed of the draws that find the accepted prefix of a draft."""
    state: AttentionState
    """The rank's positions, and its group."""
    report: Report = field(default_factory=dict)
    """[sum, count] per figure; the count of ``draft_loss`` is the denominator."""

    def from_hidden_states(
        self,
        *,
        hidden_states: Tensor,
        output_layer: ColumnParallelLinear,
        output_weight: Tensor | None,
        **context: object,
    ) -> Tensor:
        """Return the sum of the slots' losses, a scalar, and fill in the report.

        The logits of a few slots exist at once, with their gradient, which is all that is kept of them: whether a
        slot counts depends on earlier ones, which other ranks may have, and is known when all have been judged.
        """
        weight = output_layer.weight if output_weight is None else output_weight
        head = Head(weight, self.model, output_layer.tp_group)
        kind, length = self.settings.draft_kind, self.batch["segment_ids"].shape[2]
        shifted = kind.shifted(self.model.shift)
        # The host finds the slots, in its own copy of the ids: it need not wait for the device to count them.
        slots, device = Slots.of(self.batch["host_segment_ids"], kind, shifted), hidden_states.device
        index_on_host = self._own(slots.exists).flatten().nonzero()[:, 0]  # [S] into the flattened [batch, n]
        uniform = copied_to(device, self._own(self._uniform(slots.exists)).flatten(0, 1)[index_on_host])  # [S, 2]
        index, slots = copied_to(device, index_on_host), slots.copied_to(device)

        # By position, [batch, n, ...]: a clean position verifies what the next noisy one drafts, unless shifted.
        states = gather_hidden_states(hidden_states, output_layer).transpose(0, 1)
        noisy, clean = states.chunk(2, dim=1)
        # What follows a prompt is the verifier's own token: drafts begin in answers.
        usable = (self.batch["loss_mask"][:, -clean.shape[1] :] > 0) & self.batch["maskable"]
        clean = clean.detach()
        if not shifted:
            clean, usable = (self.state.shard.before(values, self.state.context_group) for values in (clean, usable))
        drafts, verifiers = (values.flatten(0, 1)[index] for values in (noisy, clean))  # [S, hidden] each

        judged = self._judge(head, drafts, verifiers, uniform, self._history(slots, shifted).flatten(0, 1)[index])
        outcomes = [usable, self._at(index, judged.agrees), self._at(index, judged.accepted)]
        passed = self.state.shard.gather(torch.stack(outcomes, dim=2), length, self.state.context_group)
        usable, agrees, accepted = passed.unbind(2)
        verdict = Verdict.of(slots, usable, agrees, accepted, self.settings)
        counted, weights = (self._own(values).flatten()[index] for values in (verdict.counted, verdict.weights))
        total = judged.total(weights * judged.has_loss)
        self.report.update(self._figures(slots, verdict))
        self.report["counted_slots"] = pair((counted & judged.has_loss).sum(), self._own(verdict.usable).sum())
        self.report["draft_loss"] = pair(total, self.report["counted_slots"][0])
        return total

    def reduce(self, losses: Tensor) -> tuple[Tensor, Tensor, Report]:
        """Return the sum of the losses, the number of slots that count, and the report."""
        return losses, self.report["draft_loss"][1].to(torch.int32), self.report

    def _judge(self, head: "Head", drafts: Tensor, verifiers: Tensor, uniform: Tensor, previous: Tensor) -> "Judged":
        """Find out what becomes of each slot.

        Args:
            head: The output layer.
            drafts: [S, hidden] states that draft.
            verifiers: [S, hidden] states that verify.
            uniform: [S, 2] draws for :func:`~nemodiff_train.drafter.loss.judge`.
            previous: [S, m] what :meth:`_history` returns of them.
        """
        learns = torch.is_grad_enabled()
        parts: list[tuple[Tensor, ...]] = []
        for draft, verifier, draw in in_chunks(drafts, verifiers, uniform):
            # Logits of the draft q and of the verifier p, [slots, vocabulary].
            with torch.no_grad():
                q, p = head.logits(draft), head.logits(verifier)
                outcome = judge(q, p, draw, self.settings)
            with torch.set_grad_enabled(learns):
                q.requires_grad_(learns)
                loss = slot_losses(q, p, self.settings)
            gradient = draft
            if learns:
                gradient = head.gradient_of_states(torch.autograd.grad(loss.sum(), q)[0]).to(draft.dtype)
            parts.append((loss.detach(), gradient.detach(), *outcome))
        losses, gradients, agrees, accepted = (torch.cat(parts) for parts in zip(*parts, strict=True))
        return JudgedDrafts(agrees, accepted, drafts, losses, gradients)

    def _history(self, slots: Slots, shifted: bool) -> Tensor:
        """Return [batch, n, m] of the text's tokens before each slot's; none, since the loss takes none."""
        return slots.number.new_zeros(*self.batch["maskable"].shape, 0)

    def _own(self, values: Tensor) -> Tensor:
        """Return this rank's positions of [batch, L, ...] values."""
        return values[:, self.state.shard.positions(values.shape[1], values.device)]

    def _at(self, index: Tensor, values: Tensor) -> Tensor:
        """Return [batch, n] values, those of the slots at ``index`` and False elsewhere."""
        spread = torch.zeros(self.batch["maskable"].shape, dtype=torch.bool, device=values.device)
        return spread.flatten().index_put((index,), values).view_as(spread)

    def _uniform(self, exists: Tensor) -> Tensor:
        """Return [batch, L, 2] numbers in [0, 1), one pair per slot, that follow from the samples' indices.

        Args:
            exists: [batch, L] whether a position is a slot; on the host, as the numbers are.
        """
        seeds = [(self.seed << 32) + index for index in self.batch["index"].tolist()]
        counts = exists.sum(1).tolist()
        draws = [
            torch.rand((count, 2), generator=torch.Generator().manual_seed(seed))
            for seed, count in zip(seeds, counts, strict=True)
        ]
        numbers = torch.zeros(*exists.shape, 2)
        numbers[exists] = torch.cat(draws)
        return numbers

    def _figures(self, slots: Slots, verdict: Verdict) -> Report:
        """Return [sum, count] of the figures that say how good greedy drafts are, over this rank's positions."""
        number, accepted, usable = (self._own(values) for values in (slots.number, verdict.accepted, verdict.usable))
        drafts = (usable & (number == 1)).sum().float()
        kind = self.settings.draft_kind
        longest = self.model.largest_block - int(kind.seed_in_block)
        figures = {}
        sure = kind.sure_tokens * drafts  # the verifier's own tokens of each cycle
        for length in {*(length for length in DRAFT_LENGTHS if length < longest), longest}:
            figures[f"acceptance_length/{length}"] = pair((accepted & (number <= length)).sum() + sure, drafts)
        for position in (position for position in POSITIONS if position <= longest):
            figures[f"acceptance_by_position/{position}"] = pair((accepted & (number == position)).sum(), drafts)
        figures["expected_tpf"] = pair(accepted.sum() + sure, 2 * drafts)  # one forward drafts, one verifies
        return figures


def in_chunks(*values: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yield parts of [S, ...] values, of as many slots as may have logits at once."""
    return zip(*(part.split(DRAFT_CHUNK[part.device.type]) for part in values), strict=True)


class Judged(Protocol):
    """What became of a rank's slots, and their loss."""

    @property
    def agrees(self) -> Tensor:
        """Return [S] whether the greedy draft is the verifier's choice."""

    @property
    def accepted(self) -> Tensor:
        """Return [S] whether the draft, drawn or greedy, is."""

    @property
    def has_loss(self) -> Tensor:
        """Return [S] whether a slot can have a loss."""

    def total(self, weights: Tensor) -> Tensor:
        """Return the weighted sum of the losses, a scalar.

        Args:
            weights: [S], known when all ranks' slots have been judged.
        """


@dataclass(frozen=True)
class JudgedDrafts:
    """The slots of a drafter, with the gradient of each loss in the place of its logits."""

    agrees: Tensor
    accepted: Tensor
    drafts: Tensor
    """[S, hidden] states that draft."""
    losses: Tensor
    """[S]."""
    gradients: Tensor
    """[S, hidden] of each loss by its state; anything without gradients."""

    @property
    def has_loss(self) -> Tensor:
        """Return True everywhere."""
        return torch.ones_like(self.agrees)

    def total(self, weights: Tensor) -> Tensor:
        """Return the weighted sum of the losses."""
        total = (self.losses * weights).sum()
        if not torch.is_grad_enabled():
            return total
        gradients = self.gradients * weights[:, None].to(self.gradients.dtype)
        result: Tensor = _WithGradient.apply(self.drafts, total, gradients)
        return result


class _WithGradient(torch.autograd.Function):
    """A loss whose gradient is known already."""

    @staticmethod
    def forward(ctx: FunctionCtx, states: Tensor, loss: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return loss.clone()

    @staticmethod
    def backward(ctx: FunctionCtx, scale: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors  # type: ignore[attr-defined]
        return gradient * scale.to(gradient.dtype), None, None


@dataclass(frozen=True)
class Head:
    """The output layer's product with its weight, whose rows tensor-parallel ranks share."""

    weight: Tensor
    """[vocabulary / tensor-parallel size, hidden]."""
    model: TriModeModelProvider
    group: dist.ProcessGroup
    """The tensor-parallel ranks."""

    def logits(self, states: Tensor) -> Tensor:
        """Return the logits [..., vocabulary] of all tokens, fp32, on every rank; the mask token is never drafted."""
        logits = (states @ self.weight.T).float()
        if self.group.size() > 1:
            shards = [torch.empty_like(logits) for _ in range(self.group.size())]
            dist.all_gather(shards, logits, group=self.group)
            logits = torch.cat(shards, dim=-1)
        logits = logits[..., : self.model.vocab_size].contiguous()
        if self.model.mask_token_id is not None:
            logits[..., self.model.mask_token_id] = NEVER
        return logits

    def rows(self, tokens: Tensor) -> Tensor:
        """Return the rows of tokens [...] on every rank: [..., hidden]; no gradient passes."""
        local = tokens - self.group.rank() * len(self.weight)
        is_local = (local >= 0) & (local < len(self.weight))
        rows = self.weight.detach()[local * is_local] * is_local[..., None]
        if self.group.size() > 1:
            dist.all_reduce(rows, group=self.group)
        return rows

    def gradient_of_states(self, gradient: Tensor) -> Tensor:
        """Return this rank's addend to the states' gradient [..., hidden], from that of all logits."""
        first = self.group.rank() * len(self.weight)
        local = gradient[..., first : first + len(self.weight)]
        return local.to(self.weight.dtype) @ self.weight[: local.shape[-1]]
