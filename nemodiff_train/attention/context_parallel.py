"""Context parallelism: what ranks that share a sequence tell each other in a layer."""

from typing import Any

import torch
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from torch import Tensor

from nemodiff_train.attention.plan import AttentionPlan


def gather_keys(key: Tensor, value: Tensor, plan: AttentionPlan, group: Any) -> tuple[Tensor, Tensor]:
    """Exchange clean keys and values in one collective; noisy ones stay where they are.

    Each rank sends the keys and values of its clean places once, and where blocks reach across chunks
    the few noisy places near the ends of its chunks.  The backward is one reduce-scatter.

    Args:
        key: [positions, batch, kv_heads, head_dim], this rank's; ``value`` likewise.
        plan: The pass's plan.
        group: The context-parallel process group.

    Returns:
        Keys and values in the order of ``plan.keys``.
    """
    sent = torch.stack([key[plan.sent], value[plan.sent]], dim=1)
    everyone = gather_from_sequence_parallel_region(sent, tensor_parallel_output_grad=True, group=group)
    received = everyone[plan.received]
    noisy = slice(0, plan.views * plan.own_places)
    return torch.cat([key[noisy], received[:, 0]]), torch.cat([value[noisy], received[:, 1]])
