"""Ask which rank this is, and talk to the others.

Light to import: torch is looked up only where it has been loaded, so a process that has no ranks pays nothing.
"""

import os
import socket
import sys
from typing import Any


def _initialized() -> Any:
    """Return ``torch.distributed`` where a process group exists, else None."""
    dist = sys.modules.get("torch.distributed")
    return dist if dist is not None and dist.is_available() and dist.is_initialized() else None


def global_rank() -> int:
    """Return the rank of this process in the world: the process group's, else the launcher's ``RANK``, else 0."""
    dist = _initialized()
    return int(dist.get_rank()) if dist else int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Return the number of ranks of the process group, or 1 where there is none yet."""
    dist = _initialized()
    return int(dist.get_world_size()) if dist else 1


def is_main_process() -> bool:
    """Return whether this is rank 0, the one that speaks."""
    return global_rank() == 0


def barrier() -> None:
    """Wait for all ranks, if there are several."""
    if world_size() > 1:
        _initialized().barrier()


def all_gather_object(value: Any) -> list[Any]:
    """Return the values of all ranks, by rank, on every rank.

    Args:
        value: Any object that can be pickled.
    """
    dist = _initialized()
    if not dist:
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def free_port() -> int:
    """Return a TCP port of this machine that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
