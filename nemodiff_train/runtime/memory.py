"""Memory of host and device: what cannot fit is refused before it is allocated, and copies do not wait."""

import psutil
import torch
from torch import Tensor

from nemodiff_train.errors import UserError
from nemodiff_train.runtime import init_runtime

GB = 1e9


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
    on_gpu = device.type == "cuda"
    free = torch.cuda.mem_get_info(device)[0] if on_gpu else psutil.virtual_memory().available
    if needed > free:
        raise UserError(f"{what} would take {needed / GB:,.1f} GB, and {free / GB:,.1f} GB are free; {remedy}")


def copied_to(device: torch.device, values: Tensor) -> Tensor:
    """Return a copy of a tensor of the host on the device, which the host does not wait for."""
    if device.type == "cuda" and init_runtime().cuda:
        values = values.pin_memory()  # a copy from other memory would wait for the device
    return values.to(device, non_blocking=True)
