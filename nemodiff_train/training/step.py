"""The forward step: Bridge's batch and model call, with our reduction of the losses."""

from collections.abc import Iterable
from functools import partial
from typing import Any

from megatron.bridge.training.gpt_step import get_batch
from megatron.bridge.training.state import GlobalState
from megatron.bridge.training.utils.pg_utils import get_pg_collection
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from nemodiff_train.objective.loss import tri_mode_loss


def forward_step(state: GlobalState, data_iterator: Iterable[Any], model: GPTModel) -> tuple[Tensor, partial[Any]]:
    """Run one micro-batch forward, as ``pretrain()`` asks.

    Returns:
        The per-token cross-entropy [batch, positions] on the last pipeline stage (hidden states
        elsewhere), and the function that reduces it.
    """
    config: Any = state.cfg
    state.timers("batch-generator", log_level=2).start()
    tokens, labels, loss_mask, _, position_ids, _ = get_batch(
        data_iterator,
        config,
        pg_collection=get_pg_collection(model),
        vp_stage=getattr(model, "vp_stage", None),
    )
    state.timers("batch-generator").stop()
    losses = model(input_ids=tokens, position_ids=position_ids, attention_mask=None, labels=labels)
    checks = {
        "check_for_nan_in_loss": config.rerun_state_machine.check_for_nan_in_loss,
        "check_for_spiky_loss": config.rerun_state_machine.check_for_spiky_loss,
    }
    joint = config.objective.stage == "joint"
    return losses, partial(tri_mode_loss, loss_mask, joint, config.objective.alpha, checks)
