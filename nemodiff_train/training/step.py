"""The forward step: a micro-batch, the model, and the reduction of its losses."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.bridge.training.state import GlobalState
from megatron.core.num_microbatches_calculator import get_num_microbatches
from megatron.core.utils import unwrap_model
from torch import Tensor

from nemodiff_train.model.head import token_losses
from nemodiff_train.objective import ObjectiveConfig
from nemodiff_train.objective.loss import Report, gradient_of, reduce, sums, tri_mode_loss
from nemodiff_train.objective.sample import Sample
from nemodiff_train.objective.schedule import alpha_at
from nemodiff_train.training.batch import Recorder, to_device
from nemodiff_train.training.callbacks.loss_breakdown import LossTally

LossFunction = partial[tuple[Tensor, Tensor, Report]]


class ForwardStep:
    """Runs one micro-batch forward, as Bridge's ``pretrain()`` asks."""

    def __init__(self) -> None:
        self.tally = LossTally()
        self.recorder = Recorder()
        self.batch: Sample | None = None
        """The micro-batch that is running forward."""
        self._ahead: list[Sample] = []
        self._diffusion_scale: Tensor | float = 1.0

    def __call__(self, state: GlobalState, data_iterator: Iterator[Any], model: Any) -> tuple[Tensor, LossFunction]:
        """Run a model chunk on its next micro-batch.

        Returns:
            The cross-entropy [batch, positions] of this rank's positions on the last pipeline stage (hidden
            states elsewhere), and the function that reduces it.
        """
        config: Any = state.cfg
        alpha = alpha_at(config.objective, state.train_state.step)
        batch, losses = self.forward(config, data_iterator, model, partial(self._total, config.objective, alpha))
        checks = {
            "check_for_nan_in_loss": config.rerun_state_machine.check_for_nan_in_loss,
            "check_for_spiky_loss": config.rerun_state_machine.check_for_spiky_loss,
        }
        tells = config.diagnostics.loss_interval and config.objective.stage == "joint"
        tally = self.tally if model.training and tells else None
        return losses, partial(_reduce, batch or {}, config.objective, alpha, self._diffusion_scale, checks, tally)

    def _total(self, objective: ObjectiveConfig, alpha: float, batch: Sample, losses: Tensor) -> Tensor:
        return reduce(sums(losses, batch, objective.noisy_views), objective, alpha, self._diffusion_scale)[0]

    def forward(
        self,
        config: Any,
        data_iterator: Iterator[Any],
        model: Any,
        total: Callable[[Sample, Tensor], Tensor],
    ) -> tuple[Sample | None, Tensor]:
        """Take the next micro-batch through a model chunk.

        Args:
            config: The recipe.
            data_iterator: Gives micro-batches.
            model: The chunk.
            total: What will be asked for its gradient: a weighted sum of the micro-batch's losses.

        Returns:
            The micro-batch, or None, and the chunk's output.
        """
        return self.run(config, data_iterator, model, partial(_losses, total=total))

    def run(
        self, config: Any, data_iterator: Iterator[Any], model: Any, process: Callable[..., Tensor]
    ) -> tuple[Sample | None, Tensor]:
        """As :meth:`forward`, with another output layer and loss.

        Args:
            config: The recipe.
            data_iterator: Gives micro-batches.
            model: The chunk.
            process: Given the micro-batch and what Megatron gives an ``output_processor``, on the last stage alone.

        Returns:
            The micro-batch, or None, and the chunk's output.
        """
        chunk = unwrap_model(model)
        batch = self._next(config, data_iterator, chunk)
        self.batch = batch
        segment_ids = batch["segment_ids"] if batch is not None and config.dataset.needs_segment_ids else None
        chunk.attention_state.rotary_segment_ids = segment_ids
        output = model(
            input_ids=batch["tokens"] if batch and chunk.pre_process else None,
            position_ids=batch["position_ids"] if batch and chunk.pre_process else None,
            attention_mask=segment_ids,
            output_processor=partial(process, batch or {}),
        )
        return batch, output

    def _next(self, config: Any, data_iterator: Iterator[Any], chunk: Any) -> Sample | None:
        """The next micro-batch; None on a stage that needs nothing of it."""
        if not (chunk.pre_process or chunk.post_process or config.dataset.needs_segment_ids):
            return None
        if config.objective.reduction == "automodel" and chunk.training and chunk.post_process:
            return self._next_read_ahead(data_iterator, chunk)
        return self._read(data_iterator, chunk)

    def _read(self, data_iterator: Iterator[Any], chunk: Any) -> Sample:
        samples = self.recorder.read(data_iterator, chunk.vp_stage or 0)
        return to_device(samples, chunk.attention_state.shard)

    def _next_read_ahead(self, data_iterator: Iterator[Any], chunk: Any) -> Sample:
        """As :meth:`_read`, having read the whole step: how much of it is masked scales its diffusion loss."""
        if not self._ahead:
            self._ahead = [self._read(data_iterator, chunk) for _ in range(get_num_microbatches())]
            self._diffusion_scale = _targets_per_masked(self._ahead, chunk.pg_collection.dp_cp)
        return self._ahead.pop(0)


def _losses(batch: Sample, total: Callable[[Sample, Tensor], Tensor], **stage: Any) -> Tensor:
    """The cross-entropy of a micro-batch, in the place of Megatron's output layer and loss."""
    labels, places, vocabulary = batch["labels"], batch["loss_indices"], stage["config"].vocab_size
    layer, table = stage["output_layer"], stage["output_weight"]
    weights = gradient_of(partial(total, batch), labels)
    return token_losses(stage["hidden_states"], labels, places, weights, vocabulary, layer, table)


def _reduce(
    batch: Sample,
    objective: ObjectiveConfig,
    alpha: float,
    scale: Tensor | float,
    checks: dict[str, Any],
    tally: LossTally | None,
    losses: Tensor,
) -> tuple[Tensor, Tensor, Report]:
    if tally is not None:
        tally.add(batch, losses.detach())
    return tri_mode_loss(batch, objective, alpha, scale, checks, losses)


def _targets_per_masked(batches: list[Sample], group: Any) -> Tensor:
    """AR targets over masked places (a mean over views) in the global batch."""
    places = batches[0]["maskable"].shape[1]
    views = batches[0]["tokens"].shape[1] // places - 1
    masked = sum((batch["loss_mask"][:, : views * places] > 0).sum() for batch in batches) / views
    targets = sum(batch["loss_mask"][:, views * places :].sum() for batch in batches)
    both = torch.stack([torch.as_tensor(targets), torch.as_tensor(masked)]).float()
    dist.all_reduce(both, group=group)
    return both[0] / both[1].clamp(min=1)
