"""The forward step: a micro-batch, the model, its loss, and what is reported of it."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from megatron.bridge.training.state import GlobalState
from megatron.core.models.gpt import GPTModel
from megatron.core.rerun_state_machine import get_rerun_state_machine
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.transformer import MegatronModule
from megatron.core.utils import unwrap_model
from torch import Tensor

from nemodiff_train.config.context import StepContext, config_of
from nemodiff_train.drafter.selector import SelectorLoss
from nemodiff_train.drafter.step import DraftLoss, draft_tokens
from nemodiff_train.model.head import output_processor, token_losses
from nemodiff_train.objective import ObjectiveConfig
from nemodiff_train.objective.breakdown import Breakdown
from nemodiff_train.objective.loss import Report, loss_weights, report
from nemodiff_train.objective.sample import Sample
from nemodiff_train.objective.schedule import alpha_at
from nemodiff_train.training.batch import BatchReader


class ForwardStep:
    """Run one micro-batch forward, as Bridge's ``pretrain()`` asks.

    Args:
        step_context: State shared with the callbacks.
    """

    def __init__(self, step_context: StepContext) -> None:
        self.step_context = step_context
        self.reader = BatchReader(step_context)

    def __call__(
        self, state: GlobalState, data_iterator: Iterator[Sample], model: MegatronModule
    ) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor, Tensor, Report]] | None]:
        """Run a model chunk on its next micro-batch.

        Returns:
            On the last pipeline stage the losses in nats, [batch, (V + 1) L] (a drafter's sum, a scalar), and the
            function that reduces them; elsewhere hidden states [positions, batch, hidden], and None.
        """
        config, chunk = config_of(state), unwrap_model(model)
        objective, trains_selector = config.objective, config.selector_rank > 0

        # 1. The micro-batch: this context-parallel rank's positions, on the device.
        batch = self.reader.read(data_iterator, config, chunk)
        self.step_context.sample_indices = None if batch is None else batch["index"]
        if batch is not None and config.drafter:
            kind, shard = config.drafter.draft_kind, chunk.attention_state.shard
            batch["tokens"] = draft_tokens(batch, config.model, kind, objective.seed, shard)

        # 2. The loss: the weight of every token's loss is known before the losses are; a drafter's need its logits.
        loss: TriModeLoss | DraftLoss | None = None
        if batch is not None and chunk.post_process:
            if config.drafter:
                loss_arguments = batch, config.drafter, config.model, objective.seed, chunk.attention_state
                loss = DraftLoss(*loss_arguments)
                if trains_selector:
                    loss = SelectorLoss(*loss_arguments, selector=chunk.selector)
            else:
                alpha = alpha_at(objective, state.train_state.step)
                # A validation loss is a mean over counted tokens, whatever the micro-batch and the step before.
                reduction_objective = objective if model.training else replace(objective, reduction="global")
                weights, denominator = loss_weights(batch, reduction_objective, alpha, self.reader.diffusion_scale)
                reports = model.training and config.diagnostics.loss_interval and objective.stage == "joint"
                breakdown = self.step_context.breakdown if reports else None
                loss = TriModeLoss(batch, weights, denominator, objective, config.model.vocab_size, breakdown)

        # 3. The model; on the last stage the loss takes the place of Megatron's output layer and loss.
        segment_ids = batch["segment_ids"] if batch is not None and config.dataset.needs_segment_ids else None
        chunk.attention_state.rotary_segment_ids = segment_ids
        if trains_selector:
            _end_gradients(chunk)
        embedding_batch = batch if chunk.pre_process else None
        output = model(
            input_ids=embedding_batch["tokens"] if embedding_batch else None,
            position_ids=embedding_batch["position_ids"] if embedding_batch else None,
            attention_mask=segment_ids,
            output_processor=output_processor(loss.losses) if loss else None,
        )

        # 4. The reduction, which Megatron calls on the losses: (sum, denominator, report).
        return output, partial(_reduce, loss, config.rerun_state_machine.check_for_spiky_loss) if loss else None


def _reduce(loss: "TriModeLoss | DraftLoss", watches: bool, losses: Tensor) -> tuple[Tensor, Tensor, Report]:
    """Reduce the losses of a micro-batch, and tell Megatron whether the sum is a spike, if it ``watches`` for one."""
    reduced = loss.reduce(losses)
    if watches:
        machine = get_rerun_state_machine()
        is_spike = partial(machine.is_unexpectedly_large, threshold=machine.spiky_loss_factor, context="loss")
        machine.validate_result(reduced[0], is_spike, "Spiky loss", fatal=False)
    return reduced


def _end_gradients(chunk: GPTModel) -> None:
    """Let no gradient pass through a frozen chunk; the stage before still gets one, of zeros, as Megatron expects."""
    received: Tensor | None = chunk.decoder.input_tensor
    if received is not None:
        chunk.set_input_tensor(received.detach())
        received.grad = torch.zeros_like(received)


@dataclass(frozen=True)
class TriModeLoss:
    """The AR and diffusion losses of a micro-batch. The drafter's loss, the other kind, has the same two methods."""

    batch: Sample
    weights: Tensor
    """[batch, (V + 1) L] of :func:`~nemodiff_train.objective.loss.loss_weights`."""
    denominator: Tensor
    """int32 scalar of the same."""
    objective: ObjectiveConfig
    vocabulary: int
    """Tokens of the model."""
    breakdown: Breakdown | None
    """Adds up the diffusion loss by noise level and position; None where nothing reports it, as in validation."""

    def losses(self, states: Tensor, layer: ColumnParallelLinear, weight: Tensor) -> Tensor:
        """Return the cross-entropy [batch, (V + 1) L] in nats, 0 where ``loss_mask`` is 0.

        The arguments are those of :func:`~nemodiff_train.model.head.output_processor`.
        """
        labels, indices = self.batch["labels"], self.batch["loss_indices"]
        return token_losses(states, labels, indices, self.weights, self.vocabulary, layer, weight)

    def reduce(self, losses: Tensor) -> tuple[Tensor, Tensor, Report]:
        """Return the weighted sum of the losses, the denominator, and the report."""
        if self.breakdown:
            self.breakdown.add(self.batch, losses.detach())
        loss = (losses * self.weights).sum()
        return loss, self.denominator, report(losses, self.batch, loss, self.denominator, self.objective)
