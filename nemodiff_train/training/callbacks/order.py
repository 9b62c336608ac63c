"""The callbacks of a run and the order in which Bridge calls them."""

from megatron.bridge.training.callbacks import Callback

from nemodiff_train.config.context import StepContext
from nemodiff_train.resilience.gradient_guard import GradientGuard
from nemodiff_train.resilience.replicas import ReplicaConsistencyCheck
from nemodiff_train.resilience.stragglers import StragglerMonitor
from nemodiff_train.resilience.watchdog import Watchdog
from nemodiff_train.training.callbacks.base_drafter import BaseDrafter
from nemodiff_train.training.callbacks.fused_optimizer import FusedOptimizer
from nemodiff_train.training.callbacks.loop_evaluation import LoopEvaluation
from nemodiff_train.training.callbacks.loss_breakdown import LossBreakdown
from nemodiff_train.training.callbacks.mask_embedding import MaskEmbedding
from nemodiff_train.training.callbacks.run_log import RunLog


def callbacks_in_order(
    shared: StepContext, breakdown: LossBreakdown, watchdog: Watchdog, log: RunLog
) -> list[Callback]:
    """Return all callbacks in the order in which each event reaches them.

    After a step, what measures comes before what may stop the run or go back to a checkpoint, and the log comes last:
    it writes the figures that all others have added to ``shared``.
    """
    return [
        BaseDrafter(),
        FusedOptimizer(),
        MaskEmbedding(shared),
        breakdown,
        LoopEvaluation(shared),
        ReplicaConsistencyCheck(),
        StragglerMonitor(shared, watchdog),
        GradientGuard(shared),
        watchdog,
        log,
    ]
