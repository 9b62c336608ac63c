"""Keep gradients that are not finite, or far too large, away from the weights."""

import contextlib
import dataclasses
import math
import statistics
from collections import deque
from pathlib import Path
from typing import Annotated

import torch
import torch.distributed as dist
from megatron.bridge.training.callbacks import Callback, CallbackContext
from megatron.bridge.training.checkpointing import CheckpointLoadContext
from megatron.bridge.training.utils.pg_utils import get_pg_collection
from pydantic import BaseModel, Field, ValidationError
from torch import Tensor

from nemodiff_train.config.context import StepContext, config_of
from nemodiff_train.console import warn
from nemodiff_train.distributed import all_gather_object, global_rank, world_size
from nemodiff_train.errors import RunStopped
from nemodiff_train.resilience.checkpoints import AtomicCheckpointManager
from nemodiff_train.runtime.patches import before_gradient_reduction, decide_on_updates

NON_FINITE, SPIKE = "non_finite", "spike"


class GradientGuard(Callback):
    """Check each step's gradient before the optimizer uses it, and let all ranks decide the same.

    Megatron leaves an update out if the optimizer's ``prepare_grads`` reports a fault, so this replaces that method.
    The gradient of each rank is checked before replicas add theirs together, since afterwards all have the fault.

    Args:
        step_context: Receives the figures, and knows where the norms of earlier steps are recorded.
    """

    def __init__(self, step_context: StepContext) -> None:
        self.step_context = step_context
        self.consecutive_skips = 0
        self.rollback_due: str | None = None
        """The fault after which the run rolls back when the step ends."""
        self.norms: deque[float] | None = None
        """Gradient norms of the last updates."""

    def on_train_start(self, context: CallbackContext) -> None:
        self.context = context
        self.settings = config_of(context.state).resilience
        self.local_fault = torch.zeros(1, dtype=torch.int32, device=torch.cuda.current_device())
        self.prepare_without_guard = decide_on_updates(context.optimizer, self._prepare_grads)
        before_gradient_reduction(context.model, self._check_local_gradient)

    def on_train_step_start(self, context: CallbackContext) -> None:
        self.local_fault.zero_()

    def _check_local_gradient(self) -> None:
        """Set ``local_fault`` if the gradient of this rank is not finite; the host does not wait for it."""
        for chunk in self.context.model:
            for buffer in chunk.buffers:  # [elements] of a buffer; their sum is not finite if one of them is not
                self.local_fault |= ~torch.isfinite(buffer.grad_data.sum(dtype=torch.float32)).reshape(1)

    @torch.no_grad()
    def _prepare_grads(self) -> bool:
        """Return whether the update is to be left out."""
        if self.prepare_without_guard():
            return True  # fp16's loss scale deals with it
        norm, fault = self._agree(self.context.optimizer.get_grad_norm())
        if fault is None:
            self.consecutive_skips = 0
            self._recorded_norms().append(norm)
            return False
        self._apply_policy(fault, norm)
        return True

    def _agree(self, norm: Tensor | float) -> tuple[float, str | None]:
        """Return the norm of this rank as a number, and a fault that any rank has; the host waits for the device."""
        local_norm = torch.as_tensor(norm, dtype=torch.float32, device=self.local_fault.device).reshape(1)
        finite, limit, norms = local_norm.isfinite(), math.inf, self._recorded_norms()
        if self.settings.spike_factor and len(norms) >= self.settings.spike_window // 2:
            limit = self.settings.spike_factor * statistics.median(norms)
        # [2]: is any gradient not finite, is any norm a spike?
        faults = torch.cat([~finite | (self.local_fault > 0), finite & (local_norm > limit)]).float()
        dist.all_reduce(faults, op=dist.ReduceOp.MAX)
        non_finite, spike, value = torch.cat([faults, local_norm]).tolist()
        if non_finite:
            return value, NON_FINITE
        return value, SPIKE if spike else None

    def _recorded_norms(self) -> deque[float]:
        """Return the norms of the last updates, including those before a resume, so that it changes no decision."""
        if self.norms is None:
            window = self.settings.spike_window
            writes_file = global_rank() == world_size() - 1
            norms = recorded_norms(self.step_context.metrics_file, window) if writes_file else []
            self.norms = deque(all_gather_object(norms)[-1], maxlen=window)
        return self.norms

    def _apply_policy(self, fault: str, norm: float) -> None:
        """Stop the run, or skip the update and note whether to roll back."""
        line = self._describe(fault, norm)
        policy = self.settings.on_non_finite if fault == NON_FINITE else self.settings.on_spike
        self.consecutive_skips += 1
        if policy == "stop":
            raise RunStopped(
                f"{line}; the weights are as before the step. Lower optimizer.lr, check the data, or set "
                f"resilience.on_{fault}=skip"
            )
        if self.consecutive_skips > self.settings.max_consecutive_skips:
            raise RunStopped(
                f"{line}; {self.consecutive_skips} consecutive steps without an update "
                "(resilience.max_consecutive_skips). Lower optimizer.lr, or check the data"
            )
        self.rollback_due = fault if policy == "rollback" else None
        self.step_context.figures[f"skipped/{fault}"] = norm if math.isfinite(norm) else 1.0
        warn(f"{line}: {'rolling back to the last checkpoint' if self.rollback_due else 'no update'}")

    def _describe(self, fault: str, norm: float) -> str:
        step = self.context.state.train_state.step + 1
        if fault == SPIKE:
            median = statistics.median(self._recorded_norms())
            return f"step {step}: gradient norm {norm:.3g} against a median of {median:.3g}"
        groups = get_pg_collection(self.context.model)
        coordinates = (groups.pp.rank(), groups.dp.rank(), groups.tp.rank()) if self.local_fault.item() else None
        ranks = [
            f"rank {rank} (stage {faulty[0]}, replica {faulty[1]}, tensor rank {faulty[2]})"
            for rank, faulty in enumerate(all_gather_object(coordinates))
            if faulty is not None
        ]
        return f"step {step}: gradient not finite on {', '.join(ranks) or 'no rank alone, only in the sum'}"

    def on_train_step_end(self, context: CallbackContext) -> None:
        """Roll back to the last checkpoint's weights, optimizer and schedule where due; steps and data go on."""
        if self.rollback_due is None:
            return
        fault, self.rollback_due = self.rollback_due, None
        state, manager = context.state, AtomicCheckpointManager.current
        checkpoint = manager.checkpoint_config
        if not checkpoint.load or manager.last_published(state) is None:
            raise RunStopped(
                f"step {state.train_state.step + 1}: no checkpoint to roll back to; save one first, or set "
                f"resilience.on_{fault}=skip"
            )
        progress = dataclasses.replace(state.train_state)
        # While the pretrained weights were loaded finetune was set; it would leave the optimizer as it is.
        finetune, checkpoint.finetune = checkpoint.finetune, False
        fixed_step, checkpoint.ckpt_step = checkpoint.ckpt_step, None
        try:
            step, _ = manager.load(CheckpointLoadContext(state, context.model, context.optimizer, context.scheduler))
        finally:
            checkpoint.finetune, checkpoint.ckpt_step = finetune, fixed_step
        vars(state.train_state).update(vars(progress))
        warn(f"rolled back to step {step} of '{checkpoint.load}'")


class _Figures(BaseModel):
    grad_norm: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None


def recorded_norms(path: Path, count: int) -> list[float]:
    """Return the gradient norms of the last ``count`` updates in ``metrics.jsonl``."""
    norms: deque[float] = deque(maxlen=count)
    with path.open("rb") as file:
        for line in file:
            with contextlib.suppress(ValidationError):  # a damaged line has no norm
                if (norm := _Figures.model_validate_json(line).grad_norm) is not None:
                    norms.append(norm)
    return list(norms)
