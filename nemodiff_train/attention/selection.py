"""Which kernel computes attention in training, with which options: one rule, and the settings that overrule it."""

import importlib.util
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from nemodiff_train.errors import nearest

KERNELS = ("auto", "flash")
_FLASH, _INSTEAD = "model.attention_kernel=flash", "set model.attention_kernel=auto"


@dataclass(frozen=True)
class Kernel:
    """How attention of a training pass is computed."""

    name: Literal["sdpa", "flex"]
    tile: tuple[int, int] = (128, 128)
    """Queries and keys of a tile of FlexAttention's block mask."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """FlexAttention's ``kernel_options``."""


def select_kernel(
    device: torch.device,
    causal: bool,
    kernel: str = "auto",
    tile: int = 0,
    options: Mapping[str, Any] | None = None,
) -> Kernel:
    """The kernel for a plan.

    The smaller a tile, the fewer pairs it holds that the rule forbids.  But FlexAttention refuses one that the steps
    of its kernels do not divide, which are up to 128 long on Hopper and Blackwell; and even that computes only a few
    percent more than the rule allows, whatever the diffusion block (tools/bench/attention).  On Blackwell the flash
    kernels take 256 queries.

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
        backend = {"BACKEND": "FLASH"}
    else:
        sides, backend = (128, 128), {}
    return Kernel("flex", (tile, tile) if tile else sides, {**backend, **(options or {})})


def kernel_problems(model: Any, positions: int, cuda: bool) -> Iterator[str]:
    """What keeps the settings of a model from being used here, a line each.

    Args:
        model: The ``TriModeModelProvider``.
        positions: Of a training sample.
        cuda: Whether there is a GPU.
    """
    kernel, tile = model.attention_kernel, model.attention_tile
    if kernel not in KERNELS:
        yield f"model.attention_kernel is '{kernel}'; use '{"' or '".join(KERNELS)}'.{nearest(str(kernel), KERNELS)}"
    if tile < 0 or tile % 16:
        yield f"model.attention_tile is {tile}; use a multiple of 16, or 0 for the kernel's own"
    if kernel != "flash":
        return
    if not cuda or torch.cuda.get_device_capability()[0] not in (9, 10):
        # On older GPUs its kernels have been reported to compute all pairs, mask or no mask.
        yield f"{_FLASH} needs a GPU of the Hopper or data-center Blackwell kind; {_INSTEAD}"
    if not _has_flash():
        yield f"{_FLASH} needs the package flash-attn-4; install it, or {_INSTEAD}"
    side = tile or 256
    if model.context_parallel_size > 1 or positions % side:
        # Nothing says what its kernels do with captured tensors behind the last whole tile.
        yield f"{_FLASH} takes samples of whole tiles of {side} positions, on one context-parallel rank; {_INSTEAD}"


def _has_flash() -> bool:
    try:
        return importlib.util.find_spec("flash_attn.cute") is not None
    except ModuleNotFoundError:
        return False
