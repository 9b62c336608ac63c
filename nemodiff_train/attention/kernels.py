"""Kernels for the attention rule.  All take and return [batch, heads, positions, head_dim].

Keys and values keep their own, smaller number of heads (grouped-query attention); no kernel expands
them.
"""

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nemodiff_train.attention.plan import AttentionPlan
from nemodiff_train.attention.selection import Kernel, select_kernel


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan: AttentionPlan,
    scale: float | None = None,
    kernel: Kernel | None = None,
) -> Tensor:
    """Attention of a training pass.

    Args:
        query: [batch, heads, queries of the plan, head_dim].
        key: [batch, kv_heads, keys of the plan, head_dim]; ``value`` likewise.
        plan: Who attends to whom.
        scale: Softmax scale; None for 1/sqrt(head_dim).
        kernel: What :func:`~nemodiff_train.attention.selection.select_kernel` returned; None for its choice without settings.
    """
    kernel = kernel or select_kernel(query.device, plan.causal)
    if kernel.name == "sdpa":
        return attend_sdpa(query, key, value, plan, scale)
    return attend_flex(query, key, value, plan, scale, kernel)


def attend_sdpa(query: Tensor, key: Tensor, value: Tensor, plan: AttentionPlan, scale: float | None = None) -> Tensor:
    """The rule with SDPA calls that together visit little more than the allowed pairs.

    The clean half of a single document is causal attention.  Everything else is taken a few blocks at a
    time, each group against the clean places before its end and its own noisy blocks.  (On a CPU,
    FlexAttention has no backward, and a dense mask would cost three times the work.)
    """
    if query.is_cuda or len(plan.groups) == 1:
        (group,) = plan.groups
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=group.mask, is_causal=group.mask is None, scale=scale, enable_gqa=True
        )
    return _Grouped.apply(query, key, value, plan, scale)


class _Grouped(torch.autograd.Function):
    """One flash kernel call for each group of queries.

    Left to autograd, every group would keep a copy of its keys for the backward pass, and turn their gradient into
    one of all keys before adding it up.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, plan: AttentionPlan, scale: float | None
    ) -> Tensor:
        ctx.plan, ctx.scale = plan, scale
        output, logsums = torch.empty_like(query), []
        for group in plan.groups:
            own, keys, values = query[:, :, group.queries], group.keys(key), group.keys(value)
            part, logsum = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                own, keys, values, 0.0, group.mask is None, attn_mask=_as(group.mask, query), scale=scale
            )
            output[:, :, group.queries] = part
            logsums.append(logsum)
        ctx.save_for_backward(query, key, value, output, *logsums)
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        query, key, value, output, *logsums = ctx.saved_tensors
        of_query, of_key, of_value = torch.empty_like(query), torch.zeros_like(key), torch.zeros_like(value)
        for group, logsum in zip(ctx.plan.groups, logsums, strict=True):
            own = group.queries
            parts = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                gradient[:, :, own], query[:, :, own], group.keys(key), group.keys(value), output[:, :, own], logsum,
                0.0, group.mask is None, attn_mask=_as(group.mask, query), scale=ctx.scale,
            )  # fmt: skip
            of_query[:, :, own] = parts[0]
            group.add_to_keys(of_key, parts[1])
            group.add_to_keys(of_value, parts[2])
        return of_query, of_key, of_value, None, None


def _as(mask: Tensor | None, like: Tensor) -> Tensor | None:
    return None if mask is None else mask.to(like.dtype)


def attend_flex(
    query: Tensor, key: Tensor, value: Tensor, plan: AttentionPlan, scale: float | None, kernel: Kernel
) -> Tensor:
    """The rule with FlexAttention: one sparse kernel, one block mask shared by all layers."""
    attend = _compiled_flex() if query.is_cuda else _flex()
    options = dict(kernel.options) or None
    mask = plan.block_mask(kernel.tile)
    return attend(query, key, value, block_mask=mask, scale=scale, enable_gqa=True, kernel_options=options)


def _flex():  # type: ignore[no-untyped-def]
    from torch.nn.attention.flex_attention import flex_attention

    return flex_attention


@functools.cache
def _compiled_flex():  # type: ignore[no-untyped-def]
    # As one graph: else, after a few recompilations, PyTorch would go on without a sparse kernel and not say so.
    return torch.compile(_flex(), dynamic=False, fullgraph=True)


def attend_cached(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None = None
) -> Tensor:
    """Attention of new tokens to a cache and themselves.

    Args:
        query: [batch, heads, new, head_dim].
        key: [batch, kv_heads, visible, head_dim]; ``value`` likewise.
        mask: [batch, 1, new, visible], True where allowed; None allows all.
    """
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale, enable_gqa=True)
