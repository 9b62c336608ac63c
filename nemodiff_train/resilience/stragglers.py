"""Which rank the others wait for, and how long a step waits for its data."""

import statistics
import time

import torch
import torch.distributed as dist
from megatron.bridge.training.callbacks import Callback, CallbackContext

from nemodiff_train.config.context import StepContext, config_of
from nemodiff_train.distributed import world_size
from nemodiff_train.resilience.gradient_guard import before_gradients_are_shared
from nemodiff_train.resilience.watchdog import Watchdog


class StragglerMonitor(Callback):
    """Every ``resilience.straggler_interval`` steps, compares the ranks' times and tells the watch.

    A rank's own time runs from the start of the step until its gradient is ready to be shared; what follows is as
    slow as the slowest.

    Args:
        shared: Knows how long the forward step has waited for data.
        watch: Shows the figures in ``status.json``.
    """

    def __init__(self, shared: StepContext, watch: Watchdog) -> None:
        self.shared = shared
        self.watch = watch
        self.own = 0.0
        self.started = 0.0

    def on_train_start(self, context: CallbackContext) -> None:
        self.interval = config_of(context.state).resilience.straggler_interval
        if self.interval:
            before_gradients_are_shared(context.model, self._ready)

    def on_train_step_start(self, context: CallbackContext) -> None:
        self.started = time.perf_counter()

    def _ready(self) -> None:
        if self.started:
            self.own += time.perf_counter() - self.started
            self.started = 0.0

    def on_train_step_end(self, context: CallbackContext) -> None:
        self.started = 0.0
        step = context.state.train_state.step + 1
        if not self.interval or step % self.interval:
            return
        own = torch.tensor([self.own, self.shared.data_wait], device=torch.cuda.current_device()) / self.interval
        self.own = self.shared.data_wait = 0.0
        found = [torch.zeros_like(own) for _ in range(world_size())]
        dist.all_gather(found, own)
        self.watch.figures = _figures([each.tolist() for each in found])


def _figures(ranks: list[list[float]]) -> dict[str, float]:
    """Of [seconds of its own, of them for data] by rank."""
    own, data = ([each[i] for each in ranks] for i in (0, 1))
    return {
        "slowest rank": own.index(max(own)),
        "slowest rank's seconds": max(own),
        "usual rank's seconds": statistics.median(own),
        "longest wait for data": max(data),
        "rank of the longest wait for data": data.index(max(data)),
    }
