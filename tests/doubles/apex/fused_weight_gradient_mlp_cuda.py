"""The extension of Apex that Core's linear layers add the gradients of their weights up with."""

from torch import Tensor


def wgrad_gemm_accum_fp32(x: Tensor, gradient: Tensor, total: Tensor) -> None:
    """Add the gradient of a weight to its buffer in fp32."""
    total += gradient.T.float() @ x.float()


def wgrad_gemm_accum_fp16(x: Tensor, gradient: Tensor, total: Tensor) -> None:
    """Add the gradient of a weight to its buffer in 16 bits."""
    total += gradient.T @ x
