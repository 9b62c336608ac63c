"""The reduction: from the losses of tokens to one scalar for the gradient, and to the figures that are reported."""

from collections.abc import Mapping

import torch
from torch import Tensor

from nemodiff_train.objective.config import ObjectiveConfig

Report = dict[str, Tensor]
"""[sum, count] per reported figure, fp32.  Bridge adds them over micro-batches and data-parallel ranks before it
divides, so every printed figure is an average over the global batch, whatever the reduction of the gradient."""


def loss_weights(
    batch: Mapping[str, Tensor], objective: ObjectiveConfig, alpha: float, diffusion_scale: Tensor | float
) -> tuple[Tensor, Tensor]:
    """Return the weight of each token's loss in a micro-batch, and the denominator.

    The loss of the micro-batch is ``(losses * weights).sum()``.  Under ``calculate_per_token_loss`` Megatron adds it
    over micro-batches and ranks and divides the gradient by the sum of the denominators.  With ``reduction=global``
    that is global averaging (Nemotron-Labs-Diffusion, arXiv 2607.05722, section 2.1)::

        loss = (ar_weight * sum of AR losses + alpha / V * sum of w * masked-token losses) / maskable tokens

    whatever the micro-batch, data-parallel size or accumulation.

    Args:
        batch: ``loss_mask`` [batch, (V + 1) L] and ``maskable`` [batch, L] of
            :class:`~nemodiff_train.objective.sample.SampleMaker`, or one context-parallel rank's positions of both.
        objective: The switches.
        alpha: Weight of the diffusion loss in this step.
        diffusion_scale: For ``reduction=automodel``: AR targets per masked position in the global batch; else 1.

    Returns:
        [batch, (V + 1) L] weights, fp32, and the denominator, an int32 scalar.
    """
    loss_mask, maskable = batch["loss_mask"], batch["maskable"]
    views = objective.noisy_views
    if not views:
        return loss_mask, loss_mask.sum().to(torch.int32)
    noisy, clean = _split_views(loss_mask, maskable.shape[1])  # [batch, V L] of w, [batch, L] of 0 and 1

    # Common factor of both parts, a scalar: 1 but for `bridge`, which divides within the micro-batch.
    factor, denominator = loss_mask.new_ones(()), maskable.sum()
    if objective.reduction == "bridge":
        factor = factor / (_masked(noisy, views) + maskable.sum())
        denominator = torch.ones_like(denominator)
    diffusion_weight: Tensor | float = alpha
    if objective.reduction == "automodel":
        diffusion_weight, denominator = alpha * diffusion_scale, clean.sum()

    # [batch, (V + 1) L]: the diffusion loss is a mean over V views, the clean half's follows.
    weights = torch.cat([noisy * (factor * diffusion_weight / views), clean * (factor * objective.ar_weight)], dim=1)
    return weights, denominator.to(torch.int32)


def report(
    losses: Tensor, batch: Mapping[str, Tensor], loss: Tensor, denominator: Tensor, objective: ObjectiveConfig
) -> Report:
    """Return the figures of one micro-batch, or of one rank's positions, as Megatron reports them.

    Args:
        losses: [batch, (V + 1) L] cross-entropy in nats; V is 0 in the AR stage.
        batch: As :func:`loss_weights` takes it.
        loss: The reduced loss.
        denominator: The loss's denominator.
        objective: The switches; the AR stage reports the AR loss alone.
    """
    length, views = batch["maskable"].shape[1], objective.noisy_views
    # [batch, V L] and [batch, L]: the weights w of masked positions and the AR mask, then the losses times these.
    noisy, clean = _split_views(batch["loss_mask"], length)
    noisy_losses, clean_losses = _split_views(losses * batch["loss_mask"], length)
    ar = {"ar_loss": pair(clean_losses.sum(), clean.sum())}
    if not views:
        return ar
    tokens = batch["maskable"].sum()
    return {
        "loss": pair(loss, denominator),
        **ar,
        "diffusion_loss": pair(noisy_losses.sum() / views, tokens),
        "masked_fraction": pair(_masked(noisy, views), tokens),
    }


def _split_views(values: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Split [batch, (V + 1) L] values into the noisy views', [batch, V L], and the clean half's, [batch, L]."""
    return values[:, :-length], values[:, -length:]


def _masked(noisy: Tensor, views: int) -> Tensor:
    """Count the masked positions with a weight, a mean over views."""
    return (noisy > 0).sum() / views


def pair(total: Tensor, count: Tensor) -> Tensor:
    """Return [sum, count] of a figure of a :data:`Report`."""
    return torch.stack([total.detach().float(), count.float()])
