"""Which kernel computes attention in training, with which options: one rule, and the settings that overrule it."""

import importlib.util
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import torch

from nemodiff_train.errors import nearest

if TYPE_CHECKING:
    from nemodiff_train.model.provider import TriModeModelProvider

KERNELS = ("auto", "flash")
_FLASH, _REMEDY = "model.attention_kernel=flash", "set model.attention_kernel=auto"


@dataclass(frozen=True)
class Kernel:
    """How attention of a training pass is computed."""

    name: Literal["sdpa", "flex"]
    tile: tuple[int, int] = (128, 128)
    """Number of queries and of keys per tile of FlexAttention's block mask."""
    options: Mapping[str, object] = field(default_factory=dict)
    """FlexAttention's ``kernel_options``."""


def select_kernel(
    device: torch.device,
    causal: bool,
    kernel: str = "auto",
    tile: int = 0,
    options: Mapping[str, object] | None = None,
) -> Kernel:
    """Select the kernel of a plan.

    The smaller a tile, the fewer pairs it holds that the rule forbids. But FlexAttention refuses tiles that the steps
    of its kernels do not divide, which are up to 128 long on Hopper and Blackwell; and even tiles of 128 compute only
    a few percent more than the rule allows, whatever the diffusion block (tools/bench/attention). On Blackwell the
    flash kernels take 256 queries.

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


def kernel_problems(model: "TriModeModelProvider", positions: int, cuda: bool) -> Iterator[str]:
    """Yield one line per reason why a model's settings of attention cannot be used here.

    Args:
        model: The model's configuration.
        positions: Number of positions of a training sample, all views included.
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
        # On older GPUs its kernels have been reported to compute all pairs, with a mask or without.
        yield f"{_FLASH} needs a Hopper or data-center Blackwell GPU; {_REMEDY}"
    if not _has_flash():
        yield f"{_FLASH} needs the package flash-attn-4; install it, or {_REMEDY}"
    side = tile or 256
    if model.context_parallel_size > 1 or positions % side:
        # It is not documented what its kernels do with captured tensors after the last whole tile.
        yield f"{_FLASH} needs samples of whole tiles of {side} positions on one context-parallel rank; {_REMEDY}"


def _has_flash() -> bool:
    try:
        return importlib.util.find_spec("flash_attn.cute") is not None
    except ModuleNotFoundError:
        return False
