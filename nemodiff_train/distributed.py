"""Rank and size of the world, and collectives of Python objects.

Light to import: torch is looked up only where it has been loaded, so a process that has no ranks pays nothing.
"""

import os
import socket
import sys
from collections.abc import Callable
from typing import Any

REPORT_DELAY = 5.0
"""Seconds that other ranks wait while one reports an error: a launcher ends all ranks as soon as one has exited."""


def _initialized() -> Any:
    """Return ``torch.distributed`` where a process group exists, else None."""
    dist = sys.modules.get("torch.distributed")
    return dist if dist is not None and dist.is_available() and dist.is_initialized() else None


def global_rank() -> int:
    """Return the rank of this process in the world: the process group's, else the launcher's ``RANK``, else 0."""
    dist = _initialized()
    return int(dist.get_rank()) if dist else int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Return the number of ranks: the process group's, else the launcher's ``WORLD_SIZE``, else 1."""
    dist = _initialized()
    return int(dist.get_world_size()) if dist else int(os.environ.get("WORLD_SIZE", "1"))


def local_rank() -> int:
    """Return the index of this process on its machine, and so of its GPU: the launcher's ``LOCAL_RANK``, else 0."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def is_main_process() -> bool:
    """Return whether this is rank 0, the one that prints."""
    return global_rank() == 0


def barrier() -> None:
    """Wait for all ranks of the process group, if there is one."""
    if dist := _initialized():
        dist.barrier()


def all_gather_object[Value](value: Value) -> list[Value]:
    """Return the values of all ranks of the process group, by rank, on every rank; the value alone without a group.

    Args:
        value: Any object that can be pickled.
    """
    dist = _initialized()
    if not dist:
        return [value]
    values = [value] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def from_main_process[Value](compute: Callable[[], Value]) -> Value:
    """Compute a value on rank 0 alone, and return it on every rank.

    Args:
        compute: Returns an object that can be pickled.
    """
    value: Any = compute() if is_main_process() else None
    return all_gather_object(value)[0]


class ReservedPort:
    """A TCP port of this machine that a process is to listen on, kept from all others until then.

    It stays bound as long as the object lives, so Linux gives it to nobody who asks for any port; a server that sets
    ``SO_REUSEADDR``, as torch's stores do, can listen to it nevertheless.

    Attributes:
        number: The port.
    """

    def __init__(self) -> None:
        self._socket = socket.socket()
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._socket.bind(("127.0.0.1", 0))
        self.number: int = self._socket.getsockname()[1]
