"""Kernels for the attention rule.  All take and return [batch, heads, positions, head_dim].

Keys and values keep their own, smaller number of heads (grouped-query attention); no kernel expands
them.
"""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from nemodiff_train.objective.rule import may_attend

# Queries of the noisy half that one SDPA call takes at a time: enough to keep the call busy, few
# enough that little of its mask is empty.
QUERY_GROUP = 128


def causal(query: Tensor, key: Tensor, value: Tensor, scale: float | None = None) -> Tensor:
    """Ordinary causal attention over L positions: the AR stage."""
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=True)


def doubled(query: Tensor, key: Tensor, value: Tensor, block_size: int, scale: float | None = None) -> Tensor:
    """Attention over ``[noisy | clean]`` under the rule, with the best kernel for the device.

    Args:
        query: [batch, heads, 2L, head_dim].
        key: [batch, kv_heads, 2L, head_dim]; ``value`` likewise.
        block_size: Places per diffusion block; divides L.
        scale: Softmax scale; None for 1/sqrt(head_dim).
    """
    kernel = doubled_flex if query.is_cuda else doubled_sdpa
    return kernel(query, key, value, block_size, scale)


def doubled_sdpa(query: Tensor, key: Tensor, value: Tensor, block_size: int, scale: float | None = None) -> Tensor:
    """The rule with SDPA calls that together visit little more than the allowed pairs.

    The clean half is causal attention.  The noisy half is taken a few blocks at a time, each group
    against the clean blocks before its last and its own noisy blocks.  (On a CPU, FlexAttention has
    no backward, and a dense 2L x 2L mask would cost three times the work.)
    """
    length = query.shape[2] // 2
    group = max(block_size, QUERY_GROUP // block_size * block_size)
    clean = causal(query[:, :, length:], key[:, :, length:], value[:, :, length:], scale)
    parts = []
    for start in range(0, length, group):
        end = min(start + group, length)
        mask = _group_mask(start, end, length, block_size, str(query.device))
        parts.append(
            F.scaled_dot_product_attention(
                query[:, :, start:end],
                _visible(key, start, end, length, block_size),
                _visible(value, start, end, length, block_size),
                attn_mask=mask,
                scale=scale,
                enable_gqa=True,
            )
        )
    return torch.cat([*parts, clean], dim=2)


def _visible(states: Tensor, start: int, end: int, length: int, block_size: int) -> Tensor:
    """What noisy queries start..end may see: their own noisy places, then the clean blocks before."""
    return torch.cat([states[:, :, start:end], states[:, :, length : length + end - block_size]], dim=2)


@functools.lru_cache(maxsize=256)
def _group_mask(start: int, end: int, length: int, block_size: int, device: str) -> Tensor:
    """The rule for one group of noisy queries: [end - start, visible keys]."""
    query = torch.arange(start, end, device=device)
    key = torch.cat([query, torch.arange(length, length + end - block_size, device=device)])
    return may_attend(query[:, None], key[None, :], length, block_size)


def doubled_flex(query: Tensor, key: Tensor, value: Tensor, block_size: int, scale: float | None = None) -> Tensor:
    """The rule with FlexAttention: one sparse kernel, one block mask shared by all layers."""
    mask = _flex_mask(query.shape[2] // 2, block_size, str(query.device))
    attend = _compiled_flex() if query.is_cuda else _flex()
    return attend(query, key, value, block_mask=mask, scale=scale, enable_gqa=True)


def _flex():  # type: ignore[no-untyped-def]
    from torch.nn.attention.flex_attention import flex_attention

    return flex_attention


@functools.cache
def _compiled_flex():  # type: ignore[no-untyped-def]
    return torch.compile(_flex(), dynamic=False)


@functools.lru_cache(maxsize=8)
def _flex_mask(length: int, block_size: int, device: str):  # type: ignore[no-untyped-def]
    from torch.nn.attention.flex_attention import create_block_mask

    def rule(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return may_attend(query, key, length, block_size)

    return create_block_mask(rule, B=None, H=None, Q_LEN=2 * length, KV_LEN=2 * length, device=device)


def cached(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None = None) -> Tensor:
    """Attention of new tokens to a cache and themselves.

    Args:
        query: [batch, heads, new, head_dim].
        key: [batch, kv_heads, visible, head_dim]; ``value`` likewise.
        mask: [batch, 1, new, visible], True where allowed; None allows all.
    """
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale, enable_gqa=True)
