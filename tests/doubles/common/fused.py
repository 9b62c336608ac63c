"""What the fused optimizers of Transformer Engine and Apex have in common, in plain torch."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class FusedAdam(torch.optim.Optimizer):
    """Adam whose step number belongs to a group of parameters."""

    def __init__(
        self, params: Any, lr: float, betas: tuple[float, float], eps: float, weight_decay: float, adam_w_mode: bool,
        capturable: bool,
    ) -> None:  # fmt: skip
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        assert adam_w_mode

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            (first, second), step = group["betas"], group["step"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                for name in ("exp_avg", "exp_avg_sq"):
                    state.setdefault(name, torch.zeros_like(parameter))
                gradient = parameter.grad
                state["exp_avg"].lerp_(gradient, 1 - first)
                state["exp_avg_sq"].mul_(second).addcmul_(gradient, gradient, value=1 - second)
                root = (state["exp_avg_sq"] / (1 - second**step)).sqrt_().add_(group["eps"])
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.addcdiv_(state["exp_avg"], root, value=-group["lr"] / (1 - first**step))


def apply(operation: Callable[..., Any], overflow: Any, lists: Any, *arguments: Any) -> Any:
    """Run an operation over lists of tensors."""
    return operation(65536, overflow, lists, *arguments)


def norm(chunk: int, overflow: Any, lists: Any, each: bool = False) -> tuple[Tensor, Tensor]:
    """Return the norm over all tensors, and that of each."""
    norms = torch.stack([tensor.float().norm() for tensor in lists[0]])
    return norms.norm().reshape(1), norms


def scale(chunk: int, overflow: Any, lists: Any, factor: Any) -> None:
    """Copy tensors, scaled."""
    for source, target in zip(*lists, strict=True):
        target.copy_(source * factor)
