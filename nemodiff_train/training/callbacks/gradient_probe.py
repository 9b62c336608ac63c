"""How the gradients of the two losses relate: norms, variances, cosine."""

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.bridge.training.callbacks import Callback, CallbackContext
from megatron.bridge.training.utils.pg_utils import get_pg_collection
from megatron.core.num_microbatches_calculator import get_num_microbatches
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate
from megatron.core.transformer.module import param_is_not_shared
from torch import Tensor

from nemodiff_train.objective.loss import sums
from nemodiff_train.objective.sample import Sample
from nemodiff_train.training.callbacks.run_log import RunLog
from nemodiff_train.training.step import ForwardStep


class GradientProbe(Callback):
    """Every ``diagnostics.gradient_interval`` steps, measures the gradient of each loss on the step's batch.

    The batch is run again, after the update, in two halves of its samples for each loss.  The two
    gradients of a loss add up to its whole gradient; the square of their difference is an unbiased
    estimate of that gradient's variance (the trace of its covariance over samples).  Training is not
    changed: gradients are cleared before each step anyway.

    Args:
        step: The forward step, whose batch is kept.
        log: Where the figures go.
    """

    def __init__(self, step: ForwardStep, log: RunLog) -> None:
        self.step = step
        self.log = log

    def on_train_step_start(self, context: CallbackContext) -> None:
        config: Any = context.state.cfg
        interval = config.diagnostics.gradient_interval
        due = interval and (context.state.train_state.step + 1) % interval == 0 and config.objective.stage == "joint"
        self.step.recorder.kept = [[] for _ in context.model] if due else None

    def on_train_step_end(self, context: CallbackContext) -> None:
        kept, self.step.recorder.kept = self.step.recorder.kept, None
        if not kept:
            return
        with gathered_parameters(context.model):
            parts = [self._gradient(context, kept, part, half) for part in ("ar", "diffusion") for half in (0, 1)]
        self.log.note(_figures(_gram(parts, context)))

    def _gradient(self, context: CallbackContext, kept: list[list[Any]], part: str, half: int) -> list[Tensor]:
        """This rank's share of the gradient of one loss on half of the samples."""
        config: Any = context.state.cfg
        for chunk in context.model:
            chunk.zero_grad_buffer()
        data: Any = [iter(batches) for batches in kept]
        get_forward_backward_func()(
            forward_step_func=partial(self._forward, config, part, half),
            data_iterator=data if len(data) > 1 else data[0],
            model=context.model,
            num_microbatches=get_num_microbatches(),
            seq_length=config.model.seq_length,
            micro_batch_size=config.train.micro_batch_size,
            forward_only=False,
        )
        return [piece.clone() for chunk in context.model for piece in _own_gradients(chunk, config)]

    def _forward(self, config: Any, part: str, half: int, data: Iterator[Any], model: Any) -> Any:
        figure = partial(_part_of_loss, config.objective.noisy_views, part, half)
        batch, losses = self.step.forward(config, data, model, lambda batch, losses: figure(batch, losses)[0])
        return losses, partial(figure, batch or {})


@contextlib.contextmanager
def gathered_parameters(chunks: Any) -> Iterator[None]:
    """Parameters complete on every rank, where the distributed optimizer gathers them while the model runs."""
    overlapped = [chunk for chunk in chunks if getattr(chunk, "use_forward_hook", False)]
    waiting = [chunk for chunk in overlapped if chunk.remove_forward_pre_hook_handles]
    for chunk in overlapped:
        if chunk in waiting:
            chunk.disable_forward_pre_hook()
        else:  # Megatron gives the hooks after the first step
            chunk.start_param_sync(force_sync=True)
    yield
    for chunk in waiting:
        chunk.enable_forward_pre_hook()


def _part_of_loss(views: int, part: str, half: int, batch: Sample, losses: Tensor) -> Any:
    """The sum of one loss over half of the samples, with the whole batch's tokens to divide by."""
    # Pairs of samples stay together, since antithetic levels make their gradients depend on each other.
    chosen = (batch["index"] // 2 % 2 == half).float()[:, None]
    found = sums(losses.float(), {**batch, "loss_mask": batch["loss_mask"] * chosen.to(losses.device)}, views)
    return getattr(found, part), found.tokens.to(torch.int32), {}


def _own_gradients(chunk: Any, config: Any) -> Iterator[Tensor]:
    """The pieces of a model chunk's gradient that no other rank counts too (data-parallel replicas apart)."""
    sharded = config.ddp.use_distributed_optimizer
    for buffer in chunk.buffers:
        for bucket in buffer.buckets:
            low, high = 0, bucket.grad_data.numel()
            if sharded:
                size = high // buffer.data_parallel_world_size
                low = buffer.data_parallel_group.rank() * size
                high = low + size
            for parameter, (start, end) in bucket.param_to_index.items():
                if param_is_not_shared(parameter) and param_is_not_tensor_parallel_duplicate(parameter):
                    yield bucket.grad_data[max(start, low) : max(max(start, low), min(end, high))]


def _gram(parts: list[list[Tensor]], context: CallbackContext) -> Tensor:
    """Inner products of the four gradients over all ranks: [4, 4] float64."""
    groups = get_pg_collection(context.model)
    gram = torch.tensor(
        [
            [sum(float((x.double() * y.double()).sum()) for x, y in zip(a, b, strict=True)) for b in parts]
            for a in parts
        ],
        dtype=torch.float64,
        device=torch.cuda.current_device(),
    )
    dist.all_reduce(gram, group=groups.mp)
    if context.state.cfg.ddp.use_distributed_optimizer:
        dist.all_reduce(gram, group=groups.dp_cp)
    return gram.cpu()


def _figures(gram: Tensor) -> dict[str, float]:
    """Figures from the inner products of (AR half 0, AR half 1, diffusion half 0, diffusion half 1)."""
    ar, diffusion = torch.tensor([1.0, 1, 0, 0]).double(), torch.tensor([0.0, 0, 1, 1]).double()

    def product(x: Tensor, y: Tensor) -> float:
        return float(x @ gram @ y)

    def difference(x: Tensor) -> Tensor:
        return x * torch.tensor([1.0, -1, 1, -1]).double()

    norms = {"ar": product(ar, ar) ** 0.5, "diffusion": product(diffusion, diffusion) ** 0.5}
    figures = {f"grad_norm/{name}": norm for name, norm in norms.items()}
    figures["gradient variance/ar"] = product(difference(ar), difference(ar))
    figures["gradient variance/diffusion"] = product(difference(diffusion), difference(diffusion))
    if norms["ar"] and norms["diffusion"]:
        figures["gradient cosine"] = product(ar, diffusion) / (norms["ar"] * norms["diffusion"])
    return figures
