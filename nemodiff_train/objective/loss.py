"""The reduction: per-token losses to one gradient, and to the figures that are reported."""

from typing import Any

import torch
from torch import Tensor

Report = dict[str, Tensor]


def weighted(loss_mask: Tensor, joint: bool, alpha: float) -> Tensor:
    """The weight of every position in the gradient: ``loss_mask`` with ``alpha`` on the noisy half.

    Args:
        loss_mask: [batch, positions] as :func:`nemodiff_train.objective.sample.double` makes it.
        joint: Whether the positions are ``[noisy | clean]``.
        alpha: Weight of the diffusion loss.
    """
    if not joint:
        return loss_mask
    noisy, clean = loss_mask.chunk(2, dim=1)
    return torch.cat([alpha * noisy, clean], dim=1)


def report(losses: Tensor, loss_mask: Tensor, joint: bool, alpha: float) -> Report:
    """Sums and counts of each part, as Megatron reports them: ``[sum, count]`` a name.

    Bridge adds these over micro-batches and data-parallel ranks before dividing, which makes every
    printed figure an average over the whole global batch.  ``count`` is the number of counted tokens
    for all of them (see :class:`~nemodiff_train.objective.config.ObjectiveConfig`).

    Args:
        losses: [batch, positions] cross-entropy in nats, fp32.
        loss_mask: As in :func:`weighted`.
    """
    losses = losses.detach()
    if not joint:
        return {"ar loss": _pair((losses * loss_mask).sum(), loss_mask.sum())}
    (noisy, clean), (weights, counts) = losses.chunk(2, dim=1), loss_mask.chunk(2, dim=1)
    tokens = counts.sum()
    ar, diffusion = (clean * counts).sum(), (noisy * weights).sum()
    return {
        "loss": _pair(ar + alpha * diffusion, tokens),
        "ar loss": _pair(ar, tokens),
        "diffusion loss": _pair(diffusion, tokens),
        "masked share": _pair((weights > 0).sum(), tokens),
    }


def _pair(total: Tensor, count: Tensor) -> Tensor:
    return torch.stack([total.float(), count.float()])


def tri_mode_loss(
    loss_mask: Tensor, joint: bool, alpha: float, checks: dict[str, Any], losses: Tensor
) -> tuple[Tensor, Tensor, Report]:
    """The loss of one micro-batch for Megatron's schedule with ``calculate_per_token_loss``.

    Megatron sums the first value over micro-batches and ranks and divides the gradient by the sum of
    the second: global averaging, whatever the micro-batch, data-parallel size or accumulation.

    Args:
        loss_mask: [batch, positions] weights.
        joint: Whether the positions are ``[noisy | clean]``.
        alpha: Weight of the diffusion loss.
        checks: Bridge's switches for NaN and spike detection.
        losses: [batch, positions] cross-entropy in nats.

    Returns:
        (sum of weighted losses, number of counted tokens as int32, figures to report).
    """
    from megatron.bridge.training.losses import masked_next_token_loss

    losses = losses.float()
    total, _, _ = masked_next_token_loss(weighted(loss_mask, joint, alpha), losses, **checks)
    figures = report(losses, loss_mask, joint, alpha)
    return total, figures["ar loss"][1].to(torch.int32), figures
