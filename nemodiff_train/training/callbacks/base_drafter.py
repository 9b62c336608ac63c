"""The drafter that a path selector is trained for."""

from megatron.bridge.training.callbacks import Callback, CallbackContext
from megatron.core.utils import unwrap_model

from nemodiff_train.config.context import config_of
from nemodiff_train.model.adapters import load_adapters
from nemodiff_train.model.checkpoint import Checkpoint
from nemodiff_train.model.draft_adapter import DraftLoRA, open_drafter
from nemodiff_train.model.loading import warn_of_other_base


class BaseDrafter(Callback):
    """Load the frozen adapters at the first start; later ones find them in the run's own checkpoints."""

    def on_train_start(self, context: CallbackContext) -> None:
        config = config_of(context.state)
        if context.state.train_state.step or not isinstance(config.peft, DraftLoRA) or not config.peft.drafter:
            return
        assert config.start is not None  # a drafter starts from a Megatron checkpoint
        drafter = Checkpoint.open(config.peft.drafter).require_drafter().verify_contents()
        warn_of_other_base(drafter, config.start)
        lora = open_drafter(drafter, config.model).lora
        load_adapters([unwrap_model(chunk) for chunk in context.model], drafter, lora)
