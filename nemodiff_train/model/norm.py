"""Norms for a machine without Transformer Engine."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def replicated_norm(config: Any, hidden_size: int, eps: float = 1e-5, **unused: Any) -> nn.Module:
    """A norm over hidden states whose weight every tensor-parallel rank holds whole.

    Megatron-Core's own torch norm refuses sequence parallel.  There each rank normalises its share of
    the positions, so its weight gradient is a part of the sum: the mark makes Megatron add the parts up.
    """
    norm = head_norm(config, hidden_size, eps)
    for parameter in norm.parameters():
        setattr(parameter, "sequence_parallel", config.sequence_parallel)  # noqa: B010  (Megatron's mark)
    return norm


def head_norm(config: Any, hidden_size: int, eps: float = 1e-5, **unused: Any) -> nn.Module:
    """A norm over the queries or keys of one head.

    Each rank normalises its own heads at every position, with or without sequence parallel; Megatron
    adds the weight gradients up by the name of the module, so no mark is needed.
    """
    kind: type[nn.RMSNorm] | type[nn.LayerNorm] = RMSNorm if config.normalization == "RMSNorm" else nn.LayerNorm
    return kind(hidden_size, eps=eps)


class RMSNorm(nn.RMSNorm):
    """PyTorch's norm, keeping its input alone for the backward pass (PyTorch's own keeps three of that size)."""

    def forward(self, x: Tensor) -> Tensor:
        return _RMSNorm.apply(x, self.weight, self.eps)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        return F.rms_norm(x, weight.shape, weight, eps)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        """With y = x r w and r = (mean(x²) + eps)^-1/2: r (g w - x r² mean(g w x)), and the sum of g x r."""
        x, weight = ctx.saved_tensors
        wide = torch.promote_types(x.dtype, torch.float32)
        x32, g = x.to(wide), gradient.to(wide)
        inverse = (x32.square().mean(-1, keepdim=True) + ctx.eps).rsqrt()
        of_weight = (g * x32).mul_(inverse).flatten(0, -2).sum(0)
        g = g * weight
        shared = (g * x32).mean(-1, keepdim=True) * inverse.square()
        return g.sub_(x32 * shared).mul_(inverse).to(x.dtype), of_weight.to(weight.dtype), None
