"""What the forward step trains a drafter on: drafts from the noisy half, their verification from the clean half.

Every block of a sample is a draft: its first token is known, all others are masked.  The noisy half has the adapters
and drafts; the clean half has none and is what AR decoding would say of the same text.  So one forward gives both, of
many drafts at once.
"""

from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import ColumnParallelLinear
from torch import Tensor
from torch.autograd.function import FunctionCtx

from nemodiff_train.drafter.config import DrafterConfig
from nemodiff_train.drafter.loss import NEVER, Slots, judge, slot_losses
from nemodiff_train.model.head import DRAFT_CHUNK, gather_hidden_states
from nemodiff_train.model.provider import TriModeModelProvider
from nemodiff_train.objective.loss import Report
from nemodiff_train.objective.sample import Sample

DRAFT_LENGTHS = (7, 15, 31)
"""Lengths of drafts whose acceptance length is reported, besides that of a whole block."""
POSITIONS = (1, 2, 4, 8, 16)
"""Positions in a draft, from 1, whose acceptance is reported."""


def draft_tokens(batch: Sample, model: TriModeModelProvider) -> Tensor:
    """Return [batch, 2L] ids: in the noisy half all but the first token of each block masked; then the clean half."""
    assert model.mask_token_id is not None  # a drafter is refused for a model that has none
    clean = batch["tokens"][:, batch["maskable"].shape[1] :]
    first_in_block = torch.arange(clean.shape[1], device=clean.device) % model.block_size == 0
    return torch.cat([clean.where(first_in_block, model.mask_token_id), clean], dim=1)


@dataclass(frozen=True)
class DraftLoss:
    """The drafter's loss of a micro-batch; a :class:`~nemodiff_train.objective.loss.MicroBatchLoss`.

    There are D = batch * L / B drafts of B - 1 slots, for blocks of B tokens.
    """

    batch: Sample
    settings: DrafterConfig
    model: TriModeModelProvider
    seed: int
    """Seed of the draws that find the accepted prefix of a draft."""
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

        The logits of a few drafts exist at once, with their gradient, which is all that is kept of them.
        """
        weight = output_layer.weight if output_weight is None else output_weight
        head = _Head(weight, self.model, output_layer.tp_group)
        drafts, verifiers = self._slots(gather_hidden_states(hidden_states, output_layer))  # [D, B - 1, hidden] each
        targets = self.batch["loss_mask"][:, self.batch["maskable"].shape[1] :] > 0
        usable = targets.unflatten(1, (-1, self.model.block_size))[:, :, :-1].flatten(0, 1)  # [D, B - 1]
        uniform = self._uniform().to(drafts.device, non_blocking=True)  # [D, B - 1, 2]

        learns = torch.is_grad_enabled()
        total, gradients = torch.zeros((), device=drafts.device), []
        drafts_at_once = max(1, DRAFT_CHUNK[drafts.device.type] // drafts.shape[1])
        chunks = (values.split(drafts_at_once) for values in (drafts, verifiers, usable, uniform))
        for draft, verifier, use, draw in zip(*chunks, strict=True):
            # Logits of the draft q and of the verifier p, [drafts, B - 1, vocabulary], and which slots count.
            with torch.no_grad():
                q, p = head.logits(draft), head.logits(verifier)
                slots = judge(q, p, use, draw, self.settings)
            with torch.set_grad_enabled(learns):
                q.requires_grad_(learns)
                loss = (slot_losses(q, p, self.settings) * slots.weights).sum()
            if learns:
                gradients.append(head.gradient_of_states(torch.autograd.grad(loss, q)[0]).to(draft.dtype))
            total += loss.detach()
            for name, pair in _figures(slots, use).items():
                self.report[name] = self.report.get(name, torch.zeros_like(pair)) + pair
        self.report["draft_loss"] = torch.stack([total, self.report["counted_slots"][0]])
        return _WithGradient.apply(drafts, total, torch.cat(gradients)) if learns else total

    def reduce(self, losses: Tensor) -> tuple[Tensor, Tensor, Report]:
        """Return the sum of the losses, the number of slots that count, and the report."""
        return losses, self.report["draft_loss"][1].to(torch.int32), self.report

    def _slots(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """Return the states that draft and those that verify, [D, B - 1, hidden] each.

        Args:
            states: [2L, batch, hidden].
        """
        size, length = self.model.block_size, self.batch["maskable"].shape[1]
        blocks = states.transpose(0, 1).unflatten(1, (2, length // size, size))  # [batch, half, L / B, B, hidden]
        # A clean position i predicts token i + 1; so does a noisy one under the shift, else it predicts token i.
        drafts = blocks[:, 0, :, :-1] if self.model.shift else blocks[:, 0, :, 1:]
        return drafts.flatten(0, 1), blocks[:, 1, :, :-1].flatten(0, 1).detach()

    def _uniform(self) -> Tensor:
        """Return [D, B - 1, 2] numbers in [0, 1) that follow from the samples' indices, whatever the layout."""
        size = self.model.block_size
        shape = (self.batch["maskable"].shape[1] // size, size - 1, 2)
        draws = [torch.Generator().manual_seed((self.seed << 32) + int(i)) for i in self.batch["index"].tolist()]
        return torch.cat([torch.rand(shape, generator=draw) for draw in draws])


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
class _Head:
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
        logits[..., self.model.mask_token_id] = NEVER
        return logits

    def gradient_of_states(self, gradient: Tensor) -> Tensor:
        """Return this rank's addend to the states' gradient [..., hidden], from that of all logits."""
        first = self.group.rank() * len(self.weight)
        local = gradient[..., first : first + len(self.weight)]
        return local.to(self.weight.dtype) @ self.weight[: local.shape[-1]]


def _figures(slots: Slots, usable: Tensor) -> Report:
    """Return [sum, count] of the figures that say how good greedy drafts are.

    Args:
        slots: The outcome of some drafts.
        usable: [drafts, B - 1] whether the data have a target there.
    """
    drafts = usable[:, 0].sum().float()
    accepted = slots.accepted.float()
    longest = accepted.shape[1]
    figures = {"counted_slots": torch.stack([slots.counted.sum().float(), usable.sum().float()])}
    for length in {*(length for length in DRAFT_LENGTHS if length < longest), longest}:
        tokens = accepted[:, :length].sum() + drafts  # with the verifier's own token after each draft
        figures[f"acceptance_length/{length}"] = torch.stack([tokens, drafts])
    for position in (position for position in POSITIONS if position <= longest):
        figures[f"acceptance_by_position/{position}"] = torch.stack([accepted[:, position - 1].sum(), drafts])
    figures["expected_tpf"] = torch.stack([accepted.sum() + drafts, 2 * drafts])  # one forward drafts, one verifies
    return figures
