"""The diffusion loss by noise level and by position in the block, in the log."""

from megatron.bridge.training.callbacks import Callback, CallbackContext
from megatron.bridge.training.utils.pg_utils import get_pg_collection

from nemodiff_train.config.context import StepContext, config_of


class LossBreakdown(Callback):
    """Report the mean losses of masked positions that the forward step has added up.

    Every ``diagnostics.loss_interval`` steps the figures ``diffusion_loss_by_noise_level/LOW-HIGH`` and
    ``diffusion_loss_by_position/FIRST-LAST``, in nats, go to the log.

    Args:
        step_context: Has the sums, and gets the figures.
    """

    def __init__(self, step_context: StepContext) -> None:
        self.step_context = step_context

    def on_train_step_end(self, context: CallbackContext) -> None:
        interval = config_of(context.state).diagnostics.loss_interval
        if interval and (context.state.train_state.step + 1) % interval == 0 and context.loss_dict:
            means = self.step_context.breakdown.take(get_pg_collection(context.model).dp_cp)
            self.step_context.figures.update(means)
