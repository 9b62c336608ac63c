"""The reduction: per-token losses to one gradient, and to the figures that are reported."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nemodiff_train.objective.config import ObjectiveConfig

Report = dict[str, Tensor]


@dataclass(frozen=True)
class Sums:
    """What one micro-batch adds to the global batch: scalars, losses in nats."""

    ar: Tensor
    """Sum of AR losses."""
    ar_targets: Tensor
    """Positions with an AR target."""
    diffusion: Tensor
    """Sum of weighted diffusion losses, a mean over views."""
    masked: Tensor
    """Masked places with a weight, a mean over views."""
    tokens: Tensor
    """Tokens that count, each of which could have been masked: the common denominator."""


def sums(losses: Tensor, batch: Mapping[str, Tensor], views: int) -> Sums:
    """Add up the losses of one micro-batch, or of one rank's part of it.

    Args:
        losses: [batch, (views + 1) places] cross-entropy in nats.
        batch: ``loss_mask`` of the same shape and ``maskable`` [batch, places]; see
            :class:`~nemodiff_train.objective.sample.SampleMaker`.
        views: Noisy views; 0 in the AR stage.
    """
    weights, places = batch["loss_mask"], batch["maskable"].shape[1]
    weighted = losses * weights
    noisy, clean = weighted[:, : views * places], weighted[:, views * places :]
    return Sums(
        ar=clean.sum(),
        ar_targets=weights[:, views * places :].sum(),
        diffusion=noisy.sum() / max(views, 1),
        masked=(weights[:, : views * places] > 0).sum() / max(views, 1),
        tokens=batch["maskable"].sum(),
    )


def reduce(
    found: Sums, objective: ObjectiveConfig, alpha: float, diffusion_scale: Tensor | float = 1.0
) -> tuple[Tensor, Tensor]:
    """The loss of one micro-batch as Megatron's schedule takes it with ``calculate_per_token_loss``.

    Megatron adds the first value over micro-batches and ranks and divides the gradient by the sum of
    the second.  With ``reduction=global`` that is global averaging, whatever the micro-batch,
    data-parallel size or accumulation.

    Args:
        found: The micro-batch's sums.
        objective: The switches.
        alpha: Weight of the diffusion loss in this step.
        diffusion_scale: For ``reduction=automodel``: AR targets over masked places in the global batch.

    Returns:
        (sum of losses, what to divide by as int32).
    """
    one = torch.ones((), dtype=torch.int32, device=found.tokens.device)
    if not objective.noisy_views:
        return found.ar, found.ar_targets.to(torch.int32)
    if objective.reduction == "automodel":
        total = objective.ar_weight * found.ar + alpha * diffusion_scale * found.diffusion
        return total, found.ar_targets.to(torch.int32)
    total = objective.ar_weight * found.ar + alpha * found.diffusion
    if objective.reduction == "bridge":
        return total / (found.masked + found.tokens), one
    return total, found.tokens.to(torch.int32)


def gradient_of(total: Callable[[Tensor], Tensor], like: Tensor) -> Tensor:
    """The gradient of a weighted sum of losses: its weights.

    Args:
        total: The sum, of losses [batch, positions].
        like: A tensor of the losses' shape and device.
    """
    with torch.enable_grad():
        losses = torch.zeros(like.shape, device=like.device, requires_grad=True)
        return torch.autograd.grad(total(losses), losses)[0]


def report(found: Sums, loss: Tensor, count: Tensor, views: int) -> Report:
    """Sums and counts of each part, as Megatron reports them: ``[sum, count]`` a name.

    Bridge adds these over micro-batches and data-parallel ranks before dividing, which makes every
    printed figure an average over the whole global batch, whatever the reduction of the gradient.

    Args:
        found: The micro-batch's sums.
        loss: What :func:`reduce` returned first.
        count: What it returned second.
        views: Noisy views; 0 in the AR stage.
    """
    ar = {"ar_loss": _pair(found.ar, found.ar_targets)}
    if not views:
        return ar
    return {
        "loss": _pair(loss, count),
        **ar,
        "diffusion_loss": _pair(found.diffusion, found.tokens),
        "masked_fraction": _pair(found.masked, found.tokens),
    }


def _pair(total: Tensor, count: Tensor) -> Tensor:
    return torch.stack([total.detach().float(), count.float()])


def tri_mode_loss(
    batch: Mapping[str, Tensor],
    objective: ObjectiveConfig,
    alpha: float,
    diffusion_scale: Tensor | float,
    checks: dict[str, Any],
    losses: Tensor,
) -> tuple[Tensor, Tensor, Report]:
    """The loss function that Megatron calls on the last pipeline stage.

    Args:
        batch: The micro-batch, as :func:`sums` takes it.
        objective: The switches.
        alpha: Weight of the diffusion loss in this step.
        diffusion_scale: As in :func:`reduce`.
        checks: Bridge's switches for NaN and spike detection.
        losses: [batch, (views + 1) places] cross-entropy in nats.

    Returns:
        (sum of losses, what to divide by as int32, figures to report).
    """
    from megatron.bridge.training.losses import masked_next_token_loss

    views = objective.noisy_views
    found = sums(losses.float(), batch, views)
    loss, count = reduce(found, objective, alpha, diffusion_scale)
    masked_next_token_loss(torch.ones_like(loss), loss, **checks)  # Bridge's watch for NaN and spikes
    return loss, count, report(found, loss, count, views)
