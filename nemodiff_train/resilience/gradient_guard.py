"""No gradient that is not finite, or far too large, reaches the weights."""

import dataclasses
import json
import math
import statistics
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.bridge.training.callbacks import Callback, CallbackContext
from megatron.bridge.training.checkpointing import CheckpointLoadContext, DefaultCheckpointManager
from megatron.bridge.training.utils.pg_utils import get_pg_collection
from torch import Tensor

from nemodiff_train.config.context import StepContext, config_of
from nemodiff_train.config.run import ResilienceConfig
from nemodiff_train.console import console
from nemodiff_train.distributed import all_gather_object, global_rank, is_main_process, world_size
from nemodiff_train.errors import RunStopped
from nemodiff_train.model.checksums import iterations

NON_FINITE, SPIKE = "non_finite", "spike"


class GradientGuard(Callback):
    """Looks at each step's gradient before the optimizer does; all ranks decide the same.

    Megatron leaves an update out when ``prepare_grads`` says that something was found, which is where this says so.
    Whose gradient was at fault is looked up before replicas add theirs together, since afterwards all have it.

    Args:
        shared: Where the figures go, and where the norms of earlier steps are recorded.
    """

    def __init__(self, shared: StepContext) -> None:
        self.shared = shared
        self.in_a_row = 0
        self.rolls_back = False
        self.norms: deque[float] | None = None

    def on_train_start(self, context: CallbackContext) -> None:
        self.context = context
        self.settings: ResilienceConfig = config_of(context.state).resilience
        self.mine = torch.zeros(1, dtype=torch.int32, device=torch.cuda.current_device())
        optimizer: Any = context.optimizer
        self.plain_prepare: Callable[[], bool] = optimizer.prepare_grads
        optimizer.prepare_grads = self._prepare
        before_gradients_are_shared(context.model, self._look)

    def on_train_step_start(self, context: CallbackContext) -> None:
        self.mine.zero_()

    def _look(self) -> None:
        """Whether this rank's own gradient is finite; the answer stays on the device."""
        for chunk in self.context.model:
            for buffer in chunk.buffers:
                self.mine |= ~torch.isfinite(buffer.grad_data.sum(dtype=torch.float32)).reshape(1)

    @torch.no_grad()
    def _prepare(self) -> bool:
        if self.plain_prepare():
            return True  # fp16's loss scale deals with it
        optimizer: Any = self.context.optimizer
        norm, fault = self._agreed(optimizer.get_grad_norm())
        if fault is None:
            self.in_a_row = 0
            self._history().append(norm)
            return False
        self.apply_policy(fault, norm)
        return True

    def _agreed(self, norm: Tensor | float) -> tuple[float, str | None]:
        """This rank's norm as a number, and what any rank has found.

        The host waits for the device here, and nowhere else in a step but to log.
        """
        own = torch.as_tensor(norm, dtype=torch.float32, device=self.mine.device).reshape(1)
        finite = own.isfinite()
        found = torch.cat([~finite | (self.mine > 0), finite & (own > self._limit())]).float()
        dist.all_reduce(found, op=dist.ReduceOp.MAX)
        broken, spiked, value = torch.cat([found, own]).tolist()
        return value, NON_FINITE if broken else SPIKE if spiked else None

    def _limit(self) -> float:
        """The norm above which a step counts as a spike."""
        settings, history = self.settings, self._history()
        if not settings.spike_factor or len(history) < settings.spike_window // 2:
            return math.inf
        return settings.spike_factor * statistics.median(history)

    def _history(self) -> deque[float]:
        """Norms of the last updates, of those before a resume too: the decision must not depend on it."""
        if self.norms is None:
            window = self.settings.spike_window
            is_last_rank = global_rank() == world_size() - 1  # the one that writes the file
            norms = recorded_norms(self.shared.metrics_file, window) if is_last_rank else []
            self.norms = deque(all_gather_object(norms)[-1], maxlen=window)
        return self.norms

    def apply_policy(self, fault: str, norm: float) -> None:
        line = self._line(fault, norm)
        reaction = self.settings.on_non_finite if fault == NON_FINITE else self.settings.on_spike
        self.in_a_row += 1
        if reaction == "stop":
            raise RunStopped(f"{line}; the weights are as before the step (resilience.on_{fault})")
        if self.in_a_row > self.settings.max_consecutive_skips:
            limit = "resilience.max_consecutive_skips"
            raise RunStopped(f"{line}; {self.in_a_row} consecutive steps without an update ({limit})")
        self.rolls_back = reaction == "rollback"
        self.shared.figures[f"skipped/{fault}"] = norm if math.isfinite(norm) else 1.0
        if is_main_process():
            done = "back to the last checkpoint's weights" if self.rolls_back else "no update"
            console.print(f"[yellow]{line}: {done}[/yellow]", soft_wrap=True)

    def _line(self, fault: str, norm: float) -> str:
        step = self.context.state.train_state.step + 1
        if fault == SPIKE:
            usual = statistics.median(self._history())
            return f"step {step}: gradient norm {norm:.3g} against a median of {usual:.3g}"
        groups = get_pg_collection(self.context.model)
        own = (groups.pp.rank(), groups.dp.rank(), groups.tp.rank()) if self.mine.item() else None
        named = [
            f"rank {rank} (stage {place[0]}, replica {place[1]}, tensor rank {place[2]})"
            for rank, place in enumerate(all_gather_object(own))
            if place is not None
        ]
        return f"step {step}: gradient not finite on {', '.join(named) or 'no rank alone, only in the sum'}"

    def on_train_step_end(self, context: CallbackContext) -> None:
        if self.rolls_back:
            self.rolls_back = False
            _roll_back(context)


def recorded_norms(path: Path, count: int) -> list[float]:
    """Return the gradient norms of the last ``count`` updates in ``metrics.jsonl``."""
    with path.open("rb") as file:
        norms = (json.loads(line).get("grad_norm") for line in file)
        return list(deque((norm for norm in norms if norm is not None), maxlen=count))


def before_gradients_are_shared(model: Any, call: Callable[[], None]) -> None:
    """Call a function in each step between the last backward pass and the sum over replicas.

    Args:
        model: The chunks.
        call: Runs once a step; with ``ddp.overlap_grad_reduce`` some of the sums have begun.
    """
    # Not the configuration's finalize_model_grads_func: that is saved with every checkpoint.
    plain = model[0].finish_grad_sync

    def finish(*words: Any, **named: Any) -> Any:
        call()
        return plain(*words, **named)

    model[0].finish_grad_sync = finish


def _roll_back(context: CallbackContext) -> None:
    """Weights, optimizer and schedule of the last checkpoint; steps and data go on from here."""
    state = context.state
    saved = config_of(state).checkpoint
    if not saved.load or not iterations(Path(saved.load)):
        raise RunStopped(f"step {state.train_state.step + 1}: there is no checkpoint to go back to")
    now = {f.name: getattr(state.train_state, f.name) for f in dataclasses.fields(state.train_state)}
    # Set while the pretrained weights were loaded, it would leave the optimizer as it is.
    finetune, saved.finetune = saved.finetune, False
    fixed, saved.ckpt_step = saved.ckpt_step, None
    try:
        step, _ = DefaultCheckpointManager(saved).load(
            CheckpointLoadContext(state, context.model, context.optimizer, context.scheduler)
        )
    finally:
        saved.finetune, saved.ckpt_step = finetune, fixed
    for name, value in now.items():
        setattr(state.train_state, name, value)
    if is_main_process():
        console.print(f"[yellow]went back to step {step} of '{saved.load}'[/yellow]", soft_wrap=True)
