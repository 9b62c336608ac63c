"""Norms for a machine without Transformer Engine."""

import torch
import torch.nn.functional as F
from megatron.core.transformer import TransformerConfig
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx


def replicated_norm(config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **unused: object) -> nn.Module:
    """Make a norm over hidden states, whose weight every tensor-parallel rank holds in full.

    Megatron-Core's own torch norm refuses sequence parallelism. There each rank normalises its part of the
    positions, so its weight gradient is a part of the sum: the mark makes Megatron add the parts up.
    """
    norm = head_norm(config, hidden_size, eps)
    for parameter in norm.parameters():
        setattr(parameter, "sequence_parallel", config.sequence_parallel)  # noqa: B010  (Megatron's mark)
    return norm


def head_norm(config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **unused: object) -> nn.Module:
    """Make a norm over the queries or keys of one head.

    Each rank normalises its own heads at every position, with or without sequence parallelism; Megatron adds up the
    weight gradients by the name of the module, so no mark is needed.
    """
    kind: type[nn.RMSNorm] | type[nn.LayerNorm] = RMSNorm if config.normalization == "RMSNorm" else nn.LayerNorm
    return kind(hidden_size, eps=eps)


class RMSNorm(nn.RMSNorm):
    """PyTorch's norm, keeping only its input for the backward pass.

    PyTorch's own keeps three tensors of that size on a CPU; on a GPU it is one kernel, and keeps as little.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Normalise [..., hidden]."""
        if x.is_cuda or not torch.is_grad_enabled():
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        return _RMSNorm.apply(x, self.weight, self.eps)


class _RMSNormContext(FunctionCtx):
    """Context of :class:`_RMSNorm`: input and weight, for its backward pass."""

    eps: float
    saved_tensors: tuple[Tensor, Tensor]


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: _RMSNormContext, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        return F.rms_norm(x, weight.shape, weight, eps)

    @staticmethod
    def backward(ctx: _RMSNormContext, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        """Differentiate y = x r w, with r = (mean(x²) + eps)^-1/2.

        With g the gradient of y, that of x is r (g w - x r² mean(g w x)); that of w is the sum of g x r.
        """
        x, weight = ctx.saved_tensors
        wide = torch.promote_types(x.dtype, torch.float32)
        x32, g = x.to(wide), gradient.to(wide)
        # [..., 1] r, and [hidden] gradient of the weight.
        inverse = (x32.square().mean(-1, keepdim=True) + ctx.eps).rsqrt()
        d_weight = (g * x32).mul_(inverse).flatten(0, -2).sum(0)
        # [..., hidden] gradient of the input.
        g = g * weight
        shared = (g * x32).mean(-1, keepdim=True) * inverse.square()
        return g.sub_(x32 * shared).mul_(inverse).to(x.dtype), d_weight.to(weight.dtype), None
