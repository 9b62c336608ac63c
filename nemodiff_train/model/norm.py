"""Norms for a machine without Transformer Engine."""

from typing import Any

from torch import nn


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
    kind: type[nn.RMSNorm] | type[nn.LayerNorm] = nn.RMSNorm if config.normalization == "RMSNorm" else nn.LayerNorm
    return kind(hidden_size, eps=eps)
