"""Check that replicas of a parameter stay identical, bit for bit."""

from collections import Counter
from collections.abc import Iterator, Sequence

import torch
from megatron.bridge.training.callbacks import Callback, CallbackContext
from megatron.bridge.training.utils.pg_utils import get_pg_collection
from torch import Tensor, nn
from torch import distributed as dist

from nemodiff_train.config.context import config_of
from nemodiff_train.distributed import all_gather_object
from nemodiff_train.errors import RunStopped
from nemodiff_train.model.parameters import gathered_parameters

_CHUNK = 1 << 22
"""Elements hashed at once; their factors take 8 bytes each."""


class ReplicaConsistencyCheck(Callback):
    """Compare hashes of all parameters every ``resilience.replica_check_interval`` steps.

    Over data- and context-parallel replicas every parameter must be the same; over tensor-parallel ranks those that
    are not split, such as norms.

    Raises:
        RunStopped: From ``on_train_step_end`` on every rank, naming the step, the parameter and the rank.
    """

    def on_train_start(self, context: CallbackContext) -> None:
        self.interval = config_of(context.state).resilience.replica_check_interval
        if not self.interval:
            return
        # Not every layer declares that it is split, but parameters that differ at the start are.
        groups = get_pg_collection(context.model)
        hashes = _gather(_hash_parameters(context.model), groups.tp)
        self.replicated = [
            not getattr(parameter, "tensor_model_parallel", False) and bool((hashes[:, i] == hashes[0, i]).all())
            for i, (_, parameter) in enumerate(_named_parameters(context.model))
        ]

    def on_train_step_end(self, context: CallbackContext) -> None:
        step = context.state.train_state.step + 1
        if not self.interval or step % self.interval:
            return
        groups = get_pg_collection(context.model)
        hashes = _hash_parameters(context.model)
        replicated = torch.tensor(self.replicated, device=hashes.device)
        difference = _first_difference(context.model, hashes, groups.dp_cp) or _first_difference(
            context.model, hashes.where(replicated, 0), groups.tp
        )
        if reported := next((line for line in all_gather_object(difference) if line), None):
            raise RunStopped(
                f"step {step}: {reported}; the memory or the arithmetic of a device is at fault. "
                "Repeat the command without it to resume from the last checkpoint"
            )


def _named_parameters(model: Sequence[nn.Module]) -> Iterator[tuple[str, nn.Parameter]]:
    for chunk in model:
        yield from chunk.named_parameters()


def _hash_parameters(model: Sequence[nn.Module]) -> Tensor:
    """Return [parameters] int64 hashes of the bits of each parameter."""
    with gathered_parameters(model), torch.no_grad():
        return torch.stack([_hash(parameter.detach()) for _, parameter in _named_parameters(model)])


def _hash(values: Tensor) -> Tensor:
    """Return an int64 hash on the values' device; a change of any single element changes it."""
    # [elements] integers with the bits of the values.
    bits = values.contiguous().reshape(-1)
    bits = bits.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[values.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=values.device)
    for start in range(0, bits.numel(), _CHUNK):
        chunk = bits[start : start + _CHUNK].to(torch.int64)
        # Odd factors are invertible modulo 2^64, so that no change of one element cancels.
        factors = torch.arange(start, start + chunk.numel(), device=values.device) * 2 + 1
        total = total * 6364136223846793005 + (chunk * factors * factors).sum()
    return total


def _gather(hashes: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Return [ranks, parameters] hashes of a group, from [parameters] of this rank."""
    gathered = [torch.zeros_like(hashes) for _ in range(group.size())]
    dist.all_gather(gathered, hashes, group=group)
    return torch.stack(gathered)


def _first_difference(model: Sequence[nn.Module], hashes: Tensor, group: dist.ProcessGroup) -> str | None:
    """Name the first parameter that differs in a group, and the ranks in the minority, or all of a tie."""
    gathered = _gather(hashes, group)
    for i, (name, _) in enumerate(_named_parameters(model)):
        column = gathered[:, i].tolist()
        [(majority, votes), *others] = Counter(column).most_common()
        if others:
            tie = votes == others[0][1]
            ranks = zip(dist.get_process_group_ranks(group), column, strict=True)
            odd = " and ".join(f"rank {rank}" for rank, value in ranks if tie or value != majority)
            return f"replicas of '{name.removeprefix('module.')}' differ: {odd}"
    return None
