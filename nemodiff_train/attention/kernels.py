"""Kernels for the attention rule, and which of them a plan takes.

All take and return [batch, heads, positions, head_dim]. Keys and values keep their own, smaller number of heads
(grouped-query attention); no kernel expands them.
"""

import functools
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import flex_attention

from nemodiff_train.attention.plan import AttentionPlan

KERNELS = ("auto", "flash")


@dataclass(frozen=True)
class Kernel:
    """Kernel of a training pass, with its tile and options."""

    name: Literal["sdpa", "flex"]
    tile: tuple[int, int] = (128, 128)
    """Number of queries and of keys per tile of FlexAttention's block mask."""
    options: Mapping[str, object] = field(default_factory=dict)
    """FlexAttention's ``kernel_options``."""


def select_kernel(
    device: torch.device,
    causal: bool,
    kernel: str = "auto",
    tile: int = 0,
    options: Mapping[str, object] | None = None,
) -> Kernel:
    """Select the kernel of a plan.

    The smaller a tile, the fewer pairs it holds that the rule forbids. But FlexAttention refuses tiles that the steps
    of its kernels do not divide, which are up to 128 long on Hopper and Blackwell; and even tiles of 128 compute only
    a few percent more than the rule allows, whatever the diffusion block (tools/bench/attention). On Blackwell the
    flash kernels take 256 queries.

    Args:
        device: Where it runs.
        causal: Whether the plan is ordinary causal attention.
        kernel: ``model.attention_kernel``.
        tile: ``model.attention_tile``.
        options: ``model.attention_options``.
    """
    if device.type != "cuda" or causal:
        return Kernel("sdpa")  # causal attention has a kernel of its own; on a CPU FlexAttention has no backward
    if kernel == "flash":
        sides = (256, 128) if torch.cuda.get_device_capability(device)[0] >= 10 else (128, 128)
        backend: dict[str, object] = {"BACKEND": "FLASH"}
    else:
        # For less than 128 queries FlexAttention would take its kernel for decoding, which has no tiles of this size.
        sides, backend = (128, 128), {"FORCE_USE_FLEX_ATTENTION": True}
    return Kernel("flex", (tile, tile) if tile else sides, {**backend, **(options or {})})


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan: AttentionPlan,
    scale: float | None,
    kernel: Kernel,
) -> Tensor:
    """Compute the attention of a training pass.

    Args:
        query: [batch, heads, queries of the plan, head_dim].
        key: [batch, kv_heads, keys of the plan, head_dim].
        value: Likewise.
        plan: Who attends to whom.
        scale: Softmax scale; None for 1/sqrt(head_dim).
        kernel: What :func:`select_kernel` returned.

    Returns:
        [batch, heads, queries, head_dim].
    """
    if kernel.name == "sdpa":
        return attend_sdpa(query, key, value, plan, scale)
    # FlexAttention: one sparse kernel, one block mask shared by all layers.
    flex, mask, options = _flex(query.is_cuda), plan.block_mask(kernel.tile), dict(kernel.options) or None
    return flex(query, key, value, block_mask=mask, scale=scale, enable_gqa=True, kernel_options=options)


def attend_sdpa(query: Tensor, key: Tensor, value: Tensor, plan: AttentionPlan, scale: float | None) -> Tensor:
    """Follow the rule with SDPA calls that together visit little more than the allowed pairs.

    The clean half of a single document is causal attention. Everything else is computed one query tile at a time,
    against the tile's own noisy blocks and the clean positions before its end. (On a CPU, FlexAttention has no
    backward pass, and a dense mask would cost three times the work.)
    """
    if query.is_cuda or len(plan.query_tiles) == 1:
        (tile,) = plan.query_tiles
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=tile.mask, is_causal=tile.mask is None, scale=scale, enable_gqa=True
        )
    return _TiledAttention.apply(query, key, value, plan, scale)


class _TiledContext(FunctionCtx):
    """Context of :class:`_TiledAttention`: the plan and the scale, for its backward pass."""

    plan: AttentionPlan
    scale: float | None
    saved_tensors: tuple[Tensor, ...]


class _TiledAttention(torch.autograd.Function):
    """One call of the CPU's flash kernel per query tile.

    Under autograd alone every tile would keep a copy of its keys for the backward pass, and would expand their
    gradient to all keys before adding it up.
    """

    @staticmethod
    def forward(
        ctx: _TiledContext, query: Tensor, key: Tensor, value: Tensor, plan: AttentionPlan, scale: float | None
    ) -> Tensor:
        ctx.plan, ctx.scale = plan, scale
        output, logsumexps = torch.empty_like(query), []
        for tile in plan.query_tiles:
            # [batch, heads, queries of the tile, head_dim] output, and [batch, heads, queries] log-sum-exp of scores.
            tile_output, logsumexp = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                query[:, :, tile.queries], tile.take_keys(key), tile.take_keys(value),
                0.0, tile.mask is None, attn_mask=_to_dtype(tile.mask, query), scale=scale,
            )  # fmt: skip
            output[:, :, tile.queries] = tile_output
            logsumexps.append(logsumexp)
        ctx.save_for_backward(query, key, value, output, *logsumexps)
        return output

    @staticmethod
    def backward(ctx: _TiledContext, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        query, key, value, output, *logsumexps = ctx.saved_tensors
        d_query, d_key, d_value = torch.empty_like(query), torch.zeros_like(key), torch.zeros_like(value)
        for tile, logsumexp in zip(ctx.plan.query_tiles, logsumexps, strict=True):
            # Gradients of the tile's queries, and of its keys and values, which other tiles share.
            index = tile.queries
            gradients = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                gradient[:, :, index], query[:, :, index], tile.take_keys(key), tile.take_keys(value),
                output[:, :, index], logsumexp, 0.0, tile.mask is None,
                attn_mask=_to_dtype(tile.mask, query), scale=ctx.scale,
            )  # fmt: skip
            d_query[:, :, index] = gradients[0]
            tile.add_to_keys(d_key, gradients[1])
            tile.add_to_keys(d_value, gradients[2])
        return d_query, d_key, d_value, None, None


def _to_dtype(mask: Tensor | None, like: Tensor) -> Tensor | None:
    return None if mask is None else mask.to(like.dtype)


@functools.cache
def _flex(compiled: bool) -> Callable[..., Any]:
    if not compiled:
        return flex_attention
    # Layouts, block sizes, validation and decoding specialize it more often than torch's limit of 8 allows.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    # fullgraph: without it PyTorch would, after a few recompilations, silently go on without a sparse kernel.
    return torch.compile(flex_attention, dynamic=False, fullgraph=True)


def without_cudnn_attention() -> AbstractContextManager[object]:
    """Leave out cuDNN's kernel, which is planned anew for each number of cached tokens: for every token decoded."""
    return sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])


def attend_cached(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scale: float | None
) -> Tensor:
    """Compute the attention of new tokens to a cache and to themselves.

    Args:
        query: [batch, heads, new, head_dim].
        key: [batch, kv_heads, visible, head_dim].
        value: Likewise.
        mask: [batch, 1, new, visible], True where allowed; None allows all, or what is causal.
        causal: Whether each new token sees those before it, and nothing is cached.
        scale: Softmax scale; None for 1/sqrt(head_dim).

    Returns:
        [batch, heads, new, head_dim].
    """
    if mask is not None and query.is_cuda:
        return attend_by_group(query, key, value, mask, scale)
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=True
    )


def attend_by_group(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float | None) -> Tensor:
    """Do what :func:`attend_cached` does under a mask, with the heads of a key head as further queries of it.

    CUDA's kernels that take a mask take as many key heads as heads; the one that is left materializes all scores.
    """
    grouped = query.unflatten(1, (key.shape[1], -1))  # [batch, kv_heads, group, new, head_dim]
    group = grouped.shape[2]
    out = F.scaled_dot_product_attention(
        grouped.flatten(2, 3), key, value, attn_mask=mask.repeat(1, 1, group, 1), scale=scale
    )
    return out.unflatten(2, (group, -1)).flatten(1, 2)
