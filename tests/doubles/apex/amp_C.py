"""Operations over lists of tensors, which Apex compiles."""

from fused import norm as multi_tensor_l2norm
from fused import scale as multi_tensor_scale

__all__ = ["multi_tensor_l2norm", "multi_tensor_scale"]
