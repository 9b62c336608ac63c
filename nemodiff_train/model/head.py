"""The output layer and its cross-entropy, at the places that carry loss, a chunk of them at a time."""

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from torch import Tensor

# Places whose logits exist at once: enough to keep a GPU busy, few enough for a CPU's cache.
ROWS = {"cuda": 512, "cpu": 128}


def token_losses(
    states: Tensor, labels: Tensor, places: Tensor, vocabulary: int, layer: Any, table: Tensor | None = None
) -> Tensor:
    """Cross-entropy of the output layer's logits.

    In the noisy half only masked places carry loss, about every second one: to leave out the others is half of
    its logits.  And of a large vocabulary the logits of all places at once would be the largest thing in memory.

    Args:
        states: [positions, batch, hidden] final hidden states; under sequence parallel this rank's positions.
        labels: [batch, positions] token ids.
        places: [n] indices into the flattened ``labels`` of the places that carry loss.
        vocabulary: Tokens; rows of the weight beyond them, which make equal shares, take no part.
        layer: The model's ``ColumnParallelLinear``.
        table: [vocab / tensor-parallel size, hidden] weight, where it is not the layer's own.

    Returns:
        [batch, positions] in nats, fp32; 0 where no loss is carried.
    """
    if layer.sequence_parallel:
        states = gather_from_sequence_parallel_region(states, tensor_parallel_output_grad=True, group=layer.tp_group)
    else:
        states = copy_to_tensor_model_parallel_region(states, group=layer.tp_group)
    chosen = states[places % len(states), places // len(states)]
    table = layer.weight if table is None else table
    first = layer.tp_group.rank() * len(table)
    targets = labels.flatten()[places] - first
    found: Tensor = _CrossEntropy.apply(chosen, table[: vocabulary - first], targets, layer.tp_group)
    losses = torch.zeros(labels.numel(), device=labels.device)
    return losses.index_put((places,), found).view(labels.shape)


class _CrossEntropy(torch.autograd.Function):
    """Cross-entropy over a vocabulary that tensor-parallel ranks hold in parts; logits are made again backward."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, table: Tensor, targets: Tensor, group: dist.ProcessGroup) -> Tensor:
        """Args: [n, hidden] states, [rows, hidden] weight, [n] targets among these rows or not. Returns [n] nats."""
        ctx.group, ctx.rows = group, ROWS[states.device.type]
        losses = torch.empty(len(states), device=states.device)
        norms = torch.empty_like(losses)
        parts = (each.split(ctx.rows) for each in (states, targets, losses, norms))
        for part, target, loss, norm in zip(*parts, strict=True):
            logits = _logits(part, table)
            largest = _over_ranks(logits.amax(-1), dist.ReduceOp.MAX, group)
            own, held = _held(target, table)
            of_target = logits.gather(-1, own[:, None])[:, 0].mul_(held)
            total = logits.sub_(largest[:, None]).exp_().sum(-1)
            both = _over_ranks(torch.stack([of_target, total]), dist.ReduceOp.SUM, group)
            norm.copy_(both[1].log() + largest)
            loss.copy_(norm - both[0])
        ctx.save_for_backward(states, table, targets, norms)
        return losses

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None]:
        """The gradient of the logits is softmax - one-hot."""
        states, table, targets, norms = ctx.saved_tensors
        of_states = torch.empty_like(states)
        of_table = torch.zeros_like(table, dtype=torch.float32)
        parts = (each.split(ctx.rows) for each in (states, targets, norms, gradient, of_states))
        for part, target, norm, scale, of_part in zip(*parts, strict=True):
            logits = _logits(part, table).sub_(norm[:, None]).exp_()
            own, held = _held(target, table)
            logits.scatter_add_(-1, own[:, None], -held[:, None])
            logits = logits.mul_(scale[:, None]).to(table.dtype)
            torch.mm(logits, table, out=of_part)
            if table.dtype == torch.float32:
                of_table.addmm_(logits.T, part)
            else:
                of_table += logits.T @ part
        return of_states, of_table.to(table.dtype), None, None


def _logits(states: Tensor, table: Tensor) -> Tensor:
    return (states @ table.T).float()


def _held(targets: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """The row of each target, and 1 where this rank has it (else row 0, and 0)."""
    held = (targets >= 0) & (targets < len(table))
    return targets * held, held.float()


def _over_ranks(values: Tensor, how: Any, group: dist.ProcessGroup) -> Tensor:
    if group.size() > 1:
        dist.all_reduce(values, how, group=group)
    return values
