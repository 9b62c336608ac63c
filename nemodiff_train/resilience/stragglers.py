"""Find the rank that the others wait for, and how long a step waits for its data."""

import statistics
import time

import torch
import torch.distributed as dist
from megatron.bridge.training.callbacks import Callback, CallbackContext

from nemodiff_train.config.context import StepContext, config_of
from nemodiff_train.distributed import world_size
from nemodiff_train.runtime.patches import before_gradient_reduction


class StragglerMonitor(Callback):
    """Compare the times of the ranks every ``resilience.straggler_interval`` steps, and show them in ``status.json``.

    The time of a rank runs from the start of the step until its gradient is ready to be reduced; what follows is as
    slow as the slowest rank.

    Args:
        step_context: Knows how long the forward step has waited for data; gets the figures.
    """

    def __init__(self, step_context: StepContext) -> None:
        self.step_context = step_context
        self.busy = 0.0
        """Seconds of this rank since the last report."""
        self.step_started = 0.0

    def on_train_start(self, context: CallbackContext) -> None:
        self.interval = config_of(context.state).resilience.straggler_interval
        if self.interval:
            before_gradient_reduction(context.model, self._gradient_ready)

    def on_train_step_start(self, context: CallbackContext) -> None:
        self.step_started = time.perf_counter()

    def _gradient_ready(self) -> None:
        if self.step_started:
            self.busy += time.perf_counter() - self.step_started
            self.step_started = 0.0

    def on_train_step_end(self, context: CallbackContext) -> None:
        self.step_started = 0.0
        step = context.state.train_state.step + 1
        if not self.interval or step % self.interval:
            return
        # [2]: seconds per step that this rank was busy, and of them waited for data.
        seconds = torch.tensor([self.busy, self.step_context.data_wait], device=torch.cuda.current_device())
        local = seconds / self.interval
        self.busy = self.step_context.data_wait = 0.0
        ranks = [torch.zeros_like(local) for _ in range(world_size())]
        dist.all_gather(ranks, local)
        busy, data_wait = torch.stack(ranks, dim=1).tolist()
        self.step_context.rank_figures = {
            "slowest_rank": busy.index(max(busy)),
            "slowest_rank_seconds": max(busy),
            "median_rank_seconds": statistics.median(busy),
            "longest_data_wait_rank": data_wait.index(max(data_wait)),
            "longest_data_wait_seconds": max(data_wait),
        }
