"""Kernels for the attention rule.  All take and return [batch, heads, positions, head_dim].

Keys and values keep their own, smaller number of heads (grouped-query attention); no kernel expands
them.
"""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from nemodiff_train.attention.plan import Plan


def planned(query: Tensor, key: Tensor, value: Tensor, plan: Plan, scale: float | None = None) -> Tensor:
    """Attention of a training pass, with the best kernel for the device.

    Args:
        query: [batch, heads, queries of the plan, head_dim].
        key: [batch, kv_heads, keys of the plan, head_dim]; ``value`` likewise.
        plan: Who attends to whom.
        scale: Softmax scale; None for 1/sqrt(head_dim).
    """
    kernel = planned_flex if query.is_cuda and not plan.causal else planned_sdpa
    return kernel(query, key, value, plan, scale)


def planned_sdpa(query: Tensor, key: Tensor, value: Tensor, plan: Plan, scale: float | None = None) -> Tensor:
    """The rule with SDPA calls that together visit little more than the allowed pairs.

    The clean half of a single document is causal attention.  Everything else is taken a few blocks at a
    time, each group against the clean places before its end and its own noisy blocks.  (On a CPU,
    FlexAttention has no backward, and a dense mask would cost three times the work.)
    """
    parts = [
        F.scaled_dot_product_attention(
            query[:, :, group.queries],
            group.keys(key),
            group.keys(value),
            attn_mask=None if group.mask is None else group.mask.to(query.dtype),
            is_causal=group.mask is None,
            scale=scale,
            enable_gqa=True,
        )
        for group in plan.groups
    ]
    return torch.cat(parts, dim=2)


def planned_flex(query: Tensor, key: Tensor, value: Tensor, plan: Plan, scale: float | None = None) -> Tensor:
    """The rule with FlexAttention: one sparse kernel, one block mask shared by all layers."""
    attend = _compiled_flex() if query.is_cuda else _flex()
    return attend(query, key, value, block_mask=plan.block_mask, scale=scale, enable_gqa=True)


def _flex():  # type: ignore[no-untyped-def]
    from torch.nn.attention.flex_attention import flex_attention

    return flex_attention


@functools.cache
def _compiled_flex():  # type: ignore[no-untyped-def]
    return torch.compile(_flex(), dynamic=False)


def cached(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None = None) -> Tensor:
    """Attention of new tokens to a cache and themselves.

    Args:
        query: [batch, heads, new, head_dim].
        key: [batch, kv_heads, visible, head_dim]; ``value`` likewise.
        mask: [batch, 1, new, visible], True where allowed; None allows all.
    """
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale, enable_gqa=True)
