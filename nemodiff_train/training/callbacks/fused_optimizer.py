"""Torch's fused Adam on a GPU, where neither Transformer Engine nor Apex brings one."""

import torch
from megatron.bridge.training.callbacks import Callback, CallbackContext
from megatron.core.optimizer import MegatronOptimizer


class FusedOptimizer(Callback):
    """Let torch's Adam update all parameters of a GPU in one kernel, for which Core has no setting."""

    def on_train_start(self, context: CallbackContext) -> None:
        fuse(context.optimizer)  # a checkpoint has been loaded by now


def fuse(optimizer: MegatronOptimizer) -> None:
    """Fuse the update of every group of parameters on a GPU, and of no other, whatever a checkpoint says.

    Args:
        optimizer: Core's, around one or several others; those that are not torch's Adam are left alone.
    """
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        inner = part.optimizer
        for group in inner.param_groups if isinstance(inner, torch.optim.Adam) else ():
            parameters = group["params"]
            group["fused"] = bool(parameters) and all(parameter.is_cuda for parameter in parameters)
            group["foreach"] = False if group["fused"] else None
            # A fused update counts its steps on the device of the parameter.
            for state in (inner.state[parameter] for parameter in parameters if parameter in inner.state):
                state["step"] = state["step"].to(state["exp_avg"].device if group["fused"] else "cpu")
