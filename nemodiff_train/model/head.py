"""The output layer and its cross-entropy, at the positions that carry loss, one chunk of them at a time."""

from collections.abc import Callable

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from torch import Tensor
from torch.autograd.function import FunctionCtx

LOGIT_CHUNK = {"cuda": 2048, "cpu": 128}
"""Positions whose logits exist at once: enough to keep a GPU busy, few enough for a CPU's cache."""
DRAFT_CHUNK = {"cuda": 512, "cpu": 128}
"""Number of positions where a drafter's logits are compared with the verifier's, which takes six times the memory."""


def token_losses(
    hidden_states: Tensor,
    labels: Tensor,
    loss_indices: Tensor,
    loss_weights: Tensor,
    vocab_size: int,
    layer: ColumnParallelLinear,
    weight: Tensor,
) -> Tensor:
    """Compute the cross-entropy of the output layer's logits.

    In the noisy half only masked positions carry loss, about every second one: leaving out the others saves half of
    its logits. With a large vocabulary the logits of all positions at once would be the largest tensor in memory, so
    they are computed in chunks; and because the weight of each loss in the total is known beforehand, each chunk's
    gradient is computed right away. No logits are kept, and none are computed twice.

    Args:
        hidden_states: [positions, batch, hidden] final states; under sequence parallelism this rank's positions.
        labels: [batch, positions] token ids.
        loss_indices: [n] indices, into the flattened ``labels``, of what carries loss.
        loss_weights: [batch, positions] gradient that each loss will receive, up to one common factor.
        vocab_size: Number of tokens; rows of the weight from there on are padding and take no part.
        layer: The model's output layer.
        weight: [vocabulary / tensor-parallel size, hidden]; the embedding's where the two are one.

    Returns:
        [batch, positions] fp32, in nats; 0 where no loss is carried.
    """
    # What otherwise runs when the layer is called: with ddp.overlap_param_gather, waiting for its weight.
    for hook in list(getattr(layer, "_forward_pre_hooks", {}).values()):
        hook(layer, ())
    hidden_states = gather_hidden_states(hidden_states, layer)
    # [n, hidden] states at the indices into [batch, positions].
    states = hidden_states[loss_indices % len(hidden_states), loss_indices // len(hidden_states)]
    # [n] targets as rows of this rank's part of the weight, and what their losses are multiplied with.
    first_token = layer.tp_group.rank() * len(weight)
    targets = labels.flatten()[loss_indices] - first_token
    scales = loss_weights.flatten()[loss_indices] if torch.is_grad_enabled() else None
    if len(weight) > vocab_size - first_token:  # a slice has a gradient of its own to be copied
        weight = weight[: vocab_size - first_token]
    losses: Tensor = _CrossEntropy.apply(states, weight, targets, scales, layer.tp_group)
    return torch.zeros(labels.numel(), device=labels.device).index_put((loss_indices,), losses).view(labels.shape)


def output_processor(losses_of: Callable[[Tensor, ColumnParallelLinear, Tensor], Tensor]) -> Callable[..., Tensor]:
    """Return what Megatron calls on the last stage instead of its output layer and loss.

    Args:
        losses_of: Takes the last layer's states [positions, batch, hidden], under sequence parallelism this rank's
            positions; the output layer; and its weight, this tensor-parallel rank's rows [rows, hidden].
    """

    def process(
        *,
        hidden_states: Tensor,
        output_layer: ColumnParallelLinear,
        output_weight: Tensor | None,
        **context: object,
    ) -> Tensor:
        weight = output_layer.weight if output_weight is None else output_weight
        return losses_of(hidden_states, output_layer, weight)

    return process


def gather_hidden_states(states: Tensor, layer: ColumnParallelLinear) -> Tensor:
    """Return the states of all positions; backward sums their gradients over the ranks that share the output layer.

    Args:
        states: [positions, batch, hidden]; under sequence parallelism this rank's positions.
        layer: The model's output layer.
    """
    if layer.sequence_parallel:
        return gather_from_sequence_parallel_region(states, tensor_parallel_output_grad=True, group=layer.tp_group)
    return copy_to_tensor_model_parallel_region(states, group=layer.tp_group)


class _CrossEntropyContext(FunctionCtx):
    """Context of :class:`_CrossEntropy`: gradients of states and weight, and loss weights, for its backward pass."""

    dtype: torch.dtype
    needs_input_grad: tuple[bool, ...]
    saved_tensors: tuple[Tensor, Tensor | None, Tensor]


class _CrossEntropy(torch.autograd.Function):
    """Cross-entropy over a vocabulary whose rows are divided among tensor-parallel ranks."""

    @staticmethod
    def forward(
        ctx: _CrossEntropyContext,
        states: Tensor,
        weight: Tensor,
        targets: Tensor,
        loss_weights: Tensor | None,
        group: dist.ProcessGroup,
    ) -> Tensor:
        """Compute the losses, and the gradients of their sum weighted by ``loss_weights``.

        Args:
            ctx: Autograd's.
            states: [n, hidden].
            weight: [v, hidden] this rank's rows of the output layer.
            targets: [n] row of each target, counted from this rank's first.
            loss_weights: [n] proportional to the gradient that the losses will receive; None without gradients.
            group: The tensor-parallel ranks.

        Returns:
            [n] fp32, in nats.
        """
        chunk = LOGIT_CHUNK[states.device.type]
        losses = torch.empty(len(states), device=states.device)
        d_states = torch.empty_like(states)
        trains_weight = loss_weights is not None and ctx.needs_input_grad[1]  # not where only adapters are trained
        d_weight = torch.zeros_like(weight, dtype=torch.float32) if trains_weight else None
        scales = losses if loss_weights is None else loss_weights
        # c = chunk positions at a time: state [c, hidden], target, loss and scale [c], d_state [c, hidden].
        chunks = (values.split(chunk) for values in (states, targets, losses, scales, d_states))
        for state, target, loss, scale, d_state in zip(*chunks, strict=True):
            # [c, v] logits, less each position's maximum over the whole vocabulary, so that exp cannot overflow.
            logits = _logits(state, weight)
            maximum = _all_reduce(logits.amax(-1), dist.ReduceOp.MAX, group)
            # [c] row of each target, and 1.0 where this rank holds it; elsewhere row 0, and 0.0.
            is_local_target = (target >= 0) & (target < len(weight))
            row, is_local = target * is_local_target, is_local_target.float()
            target_logit = logits.gather(-1, row[:, None])[:, 0].sub_(maximum).mul_(is_local)
            exponentials = logits.sub_(maximum[:, None]).exp_()
            # [c] target logit and sum of exponentials over all ranks: loss = log(sum) - target logit.
            both = torch.stack([target_logit, exponentials.sum(-1)])
            target_logit, total = _all_reduce(both, dist.ReduceOp.SUM, group)
            loss.copy_(total.log() - target_logit)
            if loss_weights is None:
                continue
            # [c, v] gradient of the logits, scale * (softmax - one-hot), in place of the exponentials.
            d_logits = exponentials.mul_((scale / total)[:, None])
            d_logits.scatter_add_(-1, row[:, None], -(scale * is_local)[:, None])
            d_logits = d_logits.to(weight.dtype)
            # [c, hidden] gradient of the states; [v, hidden] of the weight, added up over chunks in fp32.
            torch.mm(d_logits, weight, out=d_state)
            if d_weight is not None:
                _add_product(d_weight, d_logits.T, state)
        if loss_weights is not None:
            ctx.save_for_backward(d_states, d_weight, loss_weights)  # type: ignore[arg-type]  # None is allowed
        ctx.dtype = weight.dtype
        return losses

    @staticmethod
    def backward(ctx: _CrossEntropyContext, gradient: Tensor) -> tuple[Tensor, Tensor | None, None, None, None]:
        """Scale the gradients computed forward by the ratio of the losses' gradient to their weights."""
        d_states, d_weight, loss_weights = ctx.saved_tensors
        # gradient = factor * loss_weights, so the factor is their projection, <gradient, w> / <w, w>: a scalar.
        norm = (loss_weights @ loss_weights).clamp(min=torch.finfo(loss_weights.dtype).tiny)
        factor = (gradient @ loss_weights) / norm
        # In place, since these are large for a large vocabulary; autograd refuses a second backward pass.
        scaled = None if d_weight is None else d_weight.mul_(factor).to(ctx.dtype)
        return d_states.mul_(factor.to(d_states.dtype)), scaled, None, None, None


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add left @ right to a total in fp32, in place."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    elif total.is_cuda:  # no product of 16 bits in between
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
    else:
        total += left @ right


def _logits(states: Tensor, weight: Tensor) -> Tensor:
    """Return [n, v] fp32."""
    return (states @ weight.T).float()


def _all_reduce(values: Tensor, op: dist.ReduceOp.RedOpType, group: dist.ProcessGroup) -> Tensor:
    """Reduce over tensor-parallel ranks, in place."""
    if group.size() > 1:
        dist.all_reduce(values, op, group=group)
    return values
