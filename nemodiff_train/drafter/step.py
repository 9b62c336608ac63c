"""The drafter's loss in the forward step: drafts from the noisy half, their verification from the clean half.

Every block of a sample is a draft, of tokens that it does not know.  The noisy half has the adapters and drafts; the
clean half has none and verifies, as AR decoding would.  So one forward gives both, for many drafts at once.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import ColumnParallelLinear
from torch import Tensor
from torch.autograd.function import FunctionCtx

from nemodiff_train.attention.context_parallel import ContextParallelShard
from nemodiff_train.attention.state import AttentionState
from nemodiff_train.drafter.config import DrafterConfig
from nemodiff_train.drafter.loss import NEVER, simulate_acceptance, slot_losses
from nemodiff_train.drafter.slots import SlotOutcomes, Slots
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
    if kind.known_token_in_block:  # the first token of each block is known
        first = torch.ones_like(blocks, dtype=torch.bool)
        first[:, 1:] = blocks[:, 1:] != blocks[:, :-1]
        noisy = clean.where(copied_to(clean.device, shard.take(first, blocks.shape[1])), noisy)
    return torch.cat([noisy, clean], dim=1)


@dataclass
class DraftLoss:
    """The drafter's loss of a micro-batch, in the place of the step's ``TriModeLoss``.

    A context-parallel rank has n = L / size of the positions and S of the slots of its samples.
    """

    batch: Sample
    settings: DrafterConfig
    model: TriModeModelProvider
    seed: int
    """Seed of the draws that find the accepted prefix of a draft."""
    state: AttentionState
    """The rank's positions, and its group."""
    report: Report = field(init=False)
    """Of the forward pass, which returns one tensor: [sum, count] per figure; the count of ``draft_loss`` is the
    denominator."""

    @property
    def shifted(self) -> bool:
        """Return whether a position predicts the next token."""
        return self.settings.draft_kind.shifted(self.model.shift)

    def losses(self, states: Tensor, layer: ColumnParallelLinear, weight: Tensor) -> Tensor:
        """Return the sum of the slots' losses, a scalar, and make the report.

        The logits of a few slots exist at once, with their gradient, which is all that is kept of them: whether a
        slot counts depends on earlier ones, which other ranks may have, and is known when all have been evaluated.
        The arguments are those of :func:`~nemodiff_train.model.head.output_processor`.
        """
        shard, group, device = self.state.shard, self.state.context_group, states.device
        local = self._local_positions
        # The host finds the slots, in its own copy of the ids: it need not wait for the device to count them.
        slots = Slots.from_segment_ids(self.batch["host_segment_ids"], self.settings.draft_kind, self.shifted)
        index_on_host = local(slots.exists).flatten().nonzero()[:, 0]  # [S] into the flattened [batch, n]
        uniform = copied_to(device, local(self._uniform(slots.exists)).flatten(0, 1)[index_on_host])  # [S, 2]
        index, slots = copied_to(device, index_on_host), slots.copied_to(device)

        # By position, [batch, n, ...]: a clean position verifies what the next noisy one drafts, unless shifted.
        noisy, clean = gather_hidden_states(states, layer).transpose(0, 1).chunk(2, dim=1)
        # The token after a prompt is the verifier's own: drafts begin in answers.
        usable = (self.batch["loss_mask"][:, -clean.shape[1] :] > 0) & self.batch["maskable"]
        clean = clean.detach()
        if not self.shifted:
            clean, usable = (shard.shift_right(values, group) for values in (clean, usable))
        drafts, verifiers = (values.flatten(0, 1)[index] for values in (noisy, clean))  # [S, hidden] each

        head = Head(weight, self.model, layer.tp_group)
        evaluated = self._evaluate(head, LocalSlots(slots, index, drafts, verifiers, uniform))
        # Outcomes by position, [batch, n, 3], then of whole samples, [batch, L] each; False where there is no slot.
        by_position = torch.stack([usable, torch.zeros_like(usable), torch.zeros_like(usable)], dim=2)
        by_position.view(-1, 3)[index, 1:] = torch.stack([evaluated.agrees, evaluated.accepted], dim=1)
        usable, agrees, accepted = shard.gather(by_position, slots.exists.shape[1], group).unbind(2)
        outcomes = SlotOutcomes.from_acceptance(slots, usable, agrees, accepted, self.settings)
        counted, weights = (local(values).flatten()[index] for values in (outcomes.counted, outcomes.weights))
        total = evaluated.total(weights * evaluated.has_loss)
        counted_slots = pair((counted & evaluated.has_loss).sum(), local(outcomes.usable).sum())
        figures = {"counted_slots": counted_slots, "draft_loss": pair(total, counted_slots[0])}
        self.report = {**self._figures(slots, outcomes), **figures}
        return total

    def reduce(self, losses: Tensor) -> tuple[Tensor, Tensor, Report]:
        """Return the sum of the losses, the number of slots that count, and the report."""
        return losses, self.report["draft_loss"][1].to(torch.int32), self.report

    def _evaluate(self, head: "Head", slots: "LocalSlots") -> "EvaluatedSlots":
        """Evaluate each slot, and compute its loss with the gradient that takes the place of its logits."""
        needs_grad = torch.is_grad_enabled()
        parts: list[tuple[Tensor, ...]] = []
        for draft, verifier, draw in in_chunks(slots.drafts, slots.verifiers, slots.uniform):
            # Logits of the draft q and of the verifier p, [slots, vocabulary].
            with torch.no_grad():
                q, p = head.logits(draft), head.logits(verifier)
                outcome = simulate_acceptance(q, p, draw, self.settings)
            with torch.set_grad_enabled(needs_grad):
                q.requires_grad_(needs_grad)
                loss = slot_losses(q, p, self.settings)
            # The gradient [slots, hidden] of each loss by its state.
            gradient = draft
            if needs_grad:
                gradient = head.gradient_of_states(torch.autograd.grad(loss.sum(), q)[0]).to(draft.dtype)
            parts.append((*outcome, loss.detach(), gradient.detach()))
        agrees, accepted, losses, gradients = (torch.cat(column) for column in zip(*parts, strict=True))

        def total(weights: Tensor) -> Tensor:
            weighted = (losses * weights).sum()
            if not needs_grad:
                return weighted
            result: Tensor = _WithGradient.apply(
                slots.drafts, weighted, gradients * weights[:, None].to(gradients.dtype)
            )
            return result

        return EvaluatedSlots(agrees, accepted, torch.ones_like(agrees), total)

    def _local_positions(self, values: Tensor) -> Tensor:
        """Return this rank's positions of [batch, L, ...] values."""
        return values[:, self.state.shard.positions(values.shape[1], values.device)]

    def _uniform(self, exists: Tensor) -> Tensor:
        """Return [batch, L, 2] numbers in [0, 1) on the host, a pair per slot, that follow from the samples' indices.

        ``exists`` [batch, L] tells on the host whether a position is a slot.
        """
        numbers = torch.zeros(*exists.shape, 2)
        for row, index in enumerate(self.batch["index"].tolist()):
            draw = torch.Generator().manual_seed((self.seed << 32) + index)
            numbers[row, exists[row]] = torch.rand((int(exists[row].sum()), 2), generator=draw)
        return numbers

    def _figures(self, slots: Slots, outcomes: SlotOutcomes) -> Report:
        """Return [sum, count] of the figures that say how good greedy drafts are, over this rank's positions."""
        of_samples = slots.draft_position, outcomes.accepted, outcomes.usable
        draft_position, accepted, usable = map(self._local_positions, of_samples)
        kind = self.settings.draft_kind
        longest = self.model.largest_block - int(kind.known_token_in_block)
        drafts = (usable & (draft_position == 1)).sum().float()
        targets = kind.target_tokens_per_cycle * drafts  # the verifier's own tokens of each cycle
        figures = {}
        for length in {min(length, longest) for length in (*DRAFT_LENGTHS, longest)}:
            accepted_tokens = (accepted & (draft_position <= length)).sum()
            figures[f"acceptance_length/{length}"] = pair(accepted_tokens + targets, drafts)
        for position in POSITIONS:
            if position <= longest:
                accepted_here = (accepted & (draft_position == position)).sum()
                figures[f"acceptance_by_position/{position}"] = pair(accepted_here, drafts)
        figures["expected_tpf"] = pair(accepted.sum() + targets, 2 * drafts)  # one forward drafts, one verifies
        return figures


def in_chunks(*values: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yield parts of [S, ...] values, of as many slots as may have logits at once."""
    return zip(*(part.split(DRAFT_CHUNK[part.device.type]) for part in values), strict=True)


@dataclass(frozen=True)
class LocalSlots:
    """A rank's S slots, before they are evaluated."""

    of_samples: Slots
    """All slots of the samples."""
    index: Tensor
    """[S] into the rank's flattened positions, [batch, n]."""
    drafts: Tensor
    """[S, hidden] states that draft."""
    verifiers: Tensor
    """[S, hidden] states that verify."""
    uniform: Tensor
    """[S, 2] draws for :func:`~nemodiff_train.drafter.loss.simulate_acceptance`."""


@dataclass(frozen=True)
class EvaluatedSlots:
    """Outcomes of a rank's S slots, and their loss."""

    agrees: Tensor
    """[S] whether the greedy draft is the verifier's choice."""
    accepted: Tensor
    """[S] whether the draft, drawn or greedy, is."""
    has_loss: Tensor
    """[S] whether a slot can have a loss."""
    total: Callable[[Tensor], Tensor]
    """Returns the weighted sum of the losses, a scalar.  Takes the weights [S], which are known when the slots of all
    ranks have been evaluated."""


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
        # Tensor-parallel ranks have consecutive rows: the others' are zeros here, and the sum has all.
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
