"""The forward step of the drafter: drafts from the noisy half, their verification from the clean half."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.bridge.training.state import GlobalState
from torch import Tensor

from nemodiff_train.drafter.loss import NEVER, judge, slot_losses
from nemodiff_train.model.head import LOGIT_CHUNK, gather_hidden_states
from nemodiff_train.objective.loss import Report
from nemodiff_train.objective.sample import Sample
from nemodiff_train.training.step import ForwardStep, LossFunction

DRAFT_LENGTHS = (7, 15, 31)
PLACES = (1, 2, 4, 8, 16)


class DraftStep(ForwardStep):
    """Every block of a sample is a draft: its first token is known, all others are masked.

    The noisy half has the adapters and drafts; the clean half has none and is what AR decoding would say of the same
    text.  So one forward gives both, of many drafts at once.
    """

    def __call__(self, state: GlobalState, data_iterator: Iterator[Any], model: Any) -> tuple[Tensor, LossFunction]:
        """Run a model chunk on its next micro-batch.

        Returns:
            The sum of the losses on the last pipeline stage (hidden states elsewhere), and the function that
            reduces it.
        """
        config: Any = state.cfg
        figures: Report = {}
        process = partial(draft_loss, recipe=config, figures=figures)
        return self.run(config, data_iterator, model, process)[1], partial(_reduce, figures)

    def _read(self, data_iterator: Iterator[Any], chunk: Any) -> Sample:
        batch = super()._read(data_iterator, chunk)
        return {**batch, "tokens": draft_tokens(batch, chunk.config)}


def draft_tokens(batch: Sample, model: Any) -> Tensor:
    """[batch, 2L] token ids: of the noisy half the first of each block, the others masked; then the clean half."""
    clean = batch["tokens"][:, batch["maskable"].shape[1] :]
    known = torch.arange(clean.shape[1], device=clean.device) % model.block_size == 0
    return torch.cat([clean.where(known, model.mask_token_id), clean], dim=1)


def draft_loss(batch: Sample, recipe: Any, figures: Report, **stage: Any) -> Tensor:
    """The losses of a micro-batch's drafts, in the place of Megatron's output layer and loss.

    The logits of a few drafts exist at once, with their gradient, which is all that is kept of them.

    Args:
        batch: The micro-batch.
        recipe: The ``TriModeConfig``.
        figures: Filled with [sum, count] of what is reported; the gradient is divided by the count of ``draft_loss``.
        stage: Megatron's: ``hidden_states`` [2L, batch, hidden] (under sequence parallel this rank's), and the
            output layer.

    Returns:
        Their sum, a scalar.
    """
    layer, states = stage["output_layer"], stage["hidden_states"]
    states = gather_hidden_states(states, layer)
    size, length = recipe.model.block_size, batch["maskable"].shape[1]
    blocks = states.transpose(0, 1).unflatten(1, (2, length // size, size))  # [batch, half, blocks, size, hidden]
    # Clean place i says token i + 1; so does a noisy one under the shift, else it says token i.
    drafts = (blocks[:, 0, :, :-1] if recipe.model.shift else blocks[:, 0, :, 1:]).flatten(0, 1)
    verifiers = blocks[:, 1, :, :-1].flatten(0, 1).detach()
    usable = (batch["loss_mask"][:, length:] > 0).unflatten(1, (-1, size))[:, :, :-1].flatten(0, 1)
    uniform = _uniform(batch["index"], recipe.objective.seed, (length // size, size - 1, 2)).flatten(0, 1)
    table = layer.weight if stage["output_weight"] is None else stage["output_weight"]
    head = partial(_logits, table=table, config=stage["config"], group=layer.tp_group)
    total, gradients = torch.zeros((), device=states.device), []
    learns = torch.is_grad_enabled()
    parts = max(1, LOGIT_CHUNK[states.device.type] // (size - 1))
    pieces = (each.split(parts) for each in (drafts, verifiers, usable, uniform.to(states.device, non_blocking=True)))
    for draft, verifier, use, draw in zip(*pieces, strict=True):
        with torch.no_grad():
            q, p = head(draft), head(verifier)
            slots = judge(q, p, use, draw, recipe.drafter)
        with torch.set_grad_enabled(learns):
            q.requires_grad_(learns)
            loss = (slot_losses(q, p, recipe.drafter) * slots.weights).sum()
        if learns:
            gradients.append(_of_states(torch.autograd.grad(loss, q)[0], table, layer.tp_group).to(draft.dtype))
        total += loss.detach()
        for name, pair in _figures(slots, use).items():
            figures[name] = figures.get(name, torch.zeros_like(pair)) + pair
    figures["draft_loss"] = torch.stack([total, figures["counted_slots"][0]])
    return _WithGradient.apply(drafts, total, torch.cat(gradients)) if learns else total


class _WithGradient(torch.autograd.Function):
    """A loss whose gradient is known already."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, loss: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * scale.to(gradient.dtype), None, None


def _logits(states: Tensor, table: Tensor, config: Any, group: Any) -> Tensor:
    """Logits [..., vocab] of all tokens, fp32, on every tensor-parallel rank; never the mask token."""
    own = (states @ table.T).float()
    if group.size() > 1:
        shares = [torch.empty_like(own) for _ in range(group.size())]
        dist.all_gather(shares, own, group=group)
        own = torch.cat(shares, dim=-1)
    logits = own[..., : config.vocab_size].contiguous()
    logits[..., config.mask_token_id] = NEVER
    return logits


def _of_states(gradient: Tensor, table: Tensor, group: Any) -> Tensor:
    """This rank's share of the states' gradient, from that of all logits."""
    first = group.rank() * len(table)
    own = gradient[..., first : first + len(table)]
    return own.to(table.dtype) @ table[: own.shape[-1]]


def _uniform(indices: Tensor, seed: int, shape: tuple[int, ...]) -> Tensor:
    """[batch, *shape] numbers that follow from the sample's index, whatever the layout."""
    draws = [torch.Generator().manual_seed((seed << 32) + int(index)) for index in indices.tolist()]
    return torch.stack([torch.rand(shape, generator=draw) for draw in draws])


def _figures(slots: Any, usable: Tensor) -> Report:
    """[sum, count] of what tells how good greedy drafts are."""
    real = usable[:, 0].sum().float()
    kept = slots.kept.float()
    found = {"counted_slots": torch.stack([slots.counted.sum().float(), usable.sum().float()])}
    most = kept.shape[1]
    for length in {*(n for n in DRAFT_LENGTHS if n < most), most}:
        accepted = kept[:, :length].sum() + real  # the verifier's own token behind them
        found[f"acceptance_length/{length}"] = torch.stack([accepted, real])
    for place in (n for n in PLACES if n <= most):
        found[f"acceptance_by_position/{place}"] = torch.stack([kept[:, place - 1].sum(), real])
    found["expected_tpf"] = torch.stack([kept.sum() + real, 2 * real])
    return found


def _reduce(figures: Report, loss: Tensor) -> tuple[Tensor, Tensor, Report]:
    return loss, figures["draft_loss"][1].to(torch.int32), figures
