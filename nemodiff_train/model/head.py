"""The output layer and its cross-entropy, at the places that carry loss, a chunk of them at a time."""

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from torch import Tensor

# Positions whose logits exist at once: enough to keep a GPU busy, few enough for a CPU's cache.
LOGIT_CHUNK = {"cuda": 512, "cpu": 128}


def token_losses(
    states: Tensor,
    labels: Tensor,
    places: Tensor,
    weights: Tensor,
    vocabulary: int,
    layer: Any,
    table: Tensor | None = None,
) -> Tensor:
    """Cross-entropy of the output layer's logits.

    In the noisy half only masked places carry loss, about every second one: to leave out the others is half of
    its logits.  And of a large vocabulary the logits of all places at once would be the largest thing in memory:
    they are made a chunk of places at a time, and each chunk's gradient while they are there, since the weight of
    each loss is known beforehand.  So no logits are kept, and none are made twice.

    Args:
        states: [positions, batch, hidden] final hidden states; under sequence parallel this rank's positions.
        labels: [batch, positions] token ids.
        places: [n] indices into the flattened ``labels`` of the places that carry loss.
        weights: [batch, positions] what the gradient of each loss will be, up to one factor for all of them.
        vocabulary: Tokens; rows of the weight beyond them, which make equal shares, take no part.
        layer: The model's ``ColumnParallelLinear``.
        table: [vocab / tensor-parallel size, hidden] weight, where it is not the layer's own.

    Returns:
        [batch, positions] in nats, fp32; 0 where no loss is carried.
    """
    wait_for_weight(layer)
    states = gather_hidden_states(states, layer)
    chosen = states[places % len(states), places // len(states)]
    table = layer.weight if table is None else table
    first = layer.tp_group.rank() * len(table)
    targets = labels.flatten()[places] - first
    learns = torch.is_grad_enabled()
    of_places = weights.flatten()[places] if learns else None
    found: Tensor = _CrossEntropy.apply(chosen, table[: vocabulary - first], targets, of_places, layer.tp_group)
    losses = torch.zeros(labels.numel(), device=labels.device)
    return losses.index_put((places,), found).view(labels.shape)


def wait_for_weight(layer: Any) -> None:
    """Run what waits for a layer's weight: with ``ddp.overlap_param_gather``, hooks before its forward.

    The head reads the output layer's weight without calling the layer.
    """
    for hook in list(getattr(layer, "_forward_pre_hooks", {}).values()):
        hook(layer, ())


def gather_hidden_states(states: Tensor, layer: Any) -> Tensor:
    """States of all positions, whose gradients the ranks that share the output layer add up.

    Args:
        states: [positions, batch, hidden]; under sequence parallel this rank's positions.
        layer: The model's ``ColumnParallelLinear``.
    """
    if layer.sequence_parallel:
        return gather_from_sequence_parallel_region(states, tensor_parallel_output_grad=True, group=layer.tp_group)
    return copy_to_tensor_model_parallel_region(states, group=layer.tp_group)


class _CrossEntropy(torch.autograd.Function):
    """Cross-entropy over a vocabulary that tensor-parallel ranks hold in parts."""

    @staticmethod
    def forward(
        ctx: Any, states: Tensor, table: Tensor, targets: Tensor, weights: Tensor | None, group: dist.ProcessGroup
    ) -> Tensor:
        """Losses, and the gradients that ``weights`` give.

        Args:
            states: [n, hidden].
            table: [rows, hidden] weight.
            targets: [n] rows of the table, or of another rank's.
            weights: [n] what the losses' gradient is proportional to; None where none will be asked for.
            group: The tensor-parallel ranks.

        Returns:
            [n] nats.
        """
        rows = LOGIT_CHUNK[states.device.type]
        losses = torch.empty(len(states), device=states.device)
        of_states = torch.empty_like(states)
        learns = weights is not None and ctx.needs_input_grad[1]  # not where adapters alone are trained
        of_table = torch.zeros_like(table, dtype=torch.float32) if learns else None
        scales = losses if weights is None else weights
        parts = (each.split(rows) for each in (states, targets, losses, scales, of_states))
        for part, target, loss, scale, of_part in zip(*parts, strict=True):
            logits = _logits(part, table)
            largest = _over_ranks(logits.amax(-1), dist.ReduceOp.MAX, group)
            own, held = _held(target, table)
            of_target = logits.gather(-1, own[:, None])[:, 0].sub_(largest).mul_(held)
            exponentials = logits.sub_(largest[:, None]).exp_()
            of_target, total = _over_ranks(torch.stack([of_target, exponentials.sum(-1)]), dist.ReduceOp.SUM, group)
            loss.copy_(total.log() - of_target)
            if weights is not None:  # of the logits: softmax - one-hot
                gradient = exponentials.mul_((scale / total)[:, None])
                gradient.scatter_add_(-1, own[:, None], -(scale * held)[:, None])
                gradient = gradient.to(table.dtype)
                torch.mm(gradient, table, out=of_part)
                if of_table is None:
                    continue
                if table.dtype == torch.float32:
                    of_table.addmm_(gradient.T, part)
                else:
                    of_table += gradient.T @ part
        if weights is not None:
            ctx.save_for_backward(of_states, of_table, weights)
        ctx.dtype = table.dtype
        return losses

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor | None, None, None, None]:
        """What was found forward, times what the gradient is of the weights."""
        of_states, of_table, weights = ctx.saved_tensors
        factor = (gradient @ weights) / (weights @ weights).clamp(min=torch.finfo(weights.dtype).tiny)
        # In place: of a large vocabulary these are large.  A second backward pass would be refused.
        scaled = None if of_table is None else of_table.mul_(factor).to(ctx.dtype)
        return of_states.mul_(factor.to(of_states.dtype)), scaled, None, None, None


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
