"""Which kernel computes attention in training, with which options: one rule, and the settings that overrule it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch

KERNELS = ("auto", "flash")


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
        backend: dict[str, object] = {"BACKEND": "FLASH"}
    else:
        # For less than 128 queries FlexAttention would take its kernel for decoding, which has no tiles of this size.
        sides, backend = (128, 128), {"FORCE_USE_FLEX_ATTENTION": True}
    return Kernel("flex", (tile, tile) if tile else sides, {**backend, **(options or {})})
