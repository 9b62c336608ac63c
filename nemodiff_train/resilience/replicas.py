"""Replicas of a parameter stay the same, bit for bit; a rank whose copy differs computes something else."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from megatron.bridge.training.callbacks import Callback, CallbackContext
from megatron.bridge.training.utils.pg_utils import get_pg_collection
from torch import Tensor
from torch import distributed as dist

from nemodiff_train.config.context import config_of
from nemodiff_train.distributed import all_gather_object
from nemodiff_train.errors import RunStopped
from nemodiff_train.model.parameters import gathered_parameters

_PIECE = 1 << 22  # elements hashed at once: their factors take 8 bytes each


class ReplicaConsistencyCheck(Callback):
    """Every ``resilience.replica_check_interval`` steps, compares hashes of all parameters.

    Over data- and context-parallel replicas every parameter must be the same; over tensor-parallel ranks those that
    are not split, such as norms.

    Raises:
        RunStopped: From ``on_train_step_end`` on every rank, naming the step, the parameter and the rank.
    """

    def on_train_start(self, context: CallbackContext) -> None:
        self.interval = config_of(context.state).resilience.replica_check_interval
        if not self.interval:
            return
        # Not every layer says that it is split; what starts out different is.
        groups = get_pg_collection(context.model)
        found = _gathered(_hashes(context.model), groups.tp)
        self.replicated = [
            not getattr(parameter, "tensor_model_parallel", False) and bool((found[:, i] == found[0, i]).all())
            for i, (_, parameter) in enumerate(_parameters(context.model))
        ]

    def on_train_step_end(self, context: CallbackContext) -> None:
        step = context.state.train_state.step + 1
        if not self.interval or step % self.interval:
            return
        groups = get_pg_collection(context.model)
        own = _hashes(context.model)
        same = torch.tensor(self.replicated, device=own.device)
        found = _odd_one(context.model, _gathered(own, groups.dp_cp), groups.dp_cp) or _odd_one(
            context.model, _gathered(own.where(same, 0), groups.tp), groups.tp
        )
        if told := next((other for other in all_gather_object(found) if other), None):
            raise RunStopped(
                f"step {step}: {told}; the memory or the arithmetic of a device is at fault. "
                "Repeat the command without it to go on from the last checkpoint"
            )


def _parameters(model: Any) -> Iterator[tuple[str, Tensor]]:
    for chunk in model:
        yield from chunk.named_parameters()


def _hashes(model: Any) -> Tensor:
    """[parameters] int64: a hash of each one's bits."""
    with gathered_parameters(model), torch.no_grad():
        return torch.stack([_hash(parameter.detach()) for _, parameter in _parameters(model)])


def _hash(values: Tensor) -> Tensor:
    """A 64-bit hash on the values' own device; no change of one element leaves it as it was."""
    bits = values.contiguous().reshape(-1)
    bits = bits.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[values.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=values.device)
    for start in range(0, bits.numel(), _PIECE):
        piece = bits[start : start + _PIECE].to(torch.int64)
        factors = torch.arange(start, start + piece.numel(), device=values.device) * 2 + 1  # odd: invertible
        total = total * 6364136223846793005 + (piece * factors * factors).sum()
    return total


def _gathered(own: Tensor, group: Any) -> Tensor:
    """[ranks, parameters] of a group."""
    found = [torch.zeros_like(own) for _ in range(group.size())]
    dist.all_gather(found, own, group=group)
    return torch.stack(found)


def _odd_one(model: Any, hashes: Tensor, group: Any) -> str | None:
    """Which parameter differs on which rank; the fewer are named, or both of two."""
    for i, (name, _) in enumerate(_parameters(model)):
        column = hashes[:, i].tolist()
        [(usual, often), *others] = Counter(column).most_common()
        if others:
            ranks = dist.get_process_group_ranks(group)
            tie = often == others[0][1]
            odd = [rank for rank, value in zip(ranks, column, strict=True) if tie or value != usual]
            named = " and ".join(f"rank {rank}" for rank in odd)
            return f"replicas of '{name.removeprefix('module.')}' differ: {named}"
    return None
