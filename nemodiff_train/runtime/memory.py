"""Estimate before anything is allocated: what cannot fit is refused with its size."""

import psutil
import torch

from nemodiff_train.errors import UserError

GB = 1e9


def free_memory(device: torch.device) -> int:
    """Return the bytes of a device that nothing uses yet; of a CPU, those of the machine."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available


def require_memory(needed: float, device: torch.device, what: str, remedy: str) -> None:
    """Refuse what would take more memory than is free.

    Args:
        needed: Bytes.
        device: Where they are taken.
        what: Subject of the message: what takes them.
        remedy: What the user can do.

    Raises:
        UserError: Names both sizes.
    """
    free = free_memory(device)
    if needed > free:
        raise UserError(f"{what} would take {needed / GB:,.1f} GB, and {free / GB:,.1f} GB are free; {remedy}")
