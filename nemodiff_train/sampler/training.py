"""Training of the trained sampler on what trajectories record: one state of a block per forward."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor

from nemodiff_train.sampler.network import SlotNetwork

_WARM_UP = 0.05


@dataclass(frozen=True)
class States:
    """States of blocks, one per forward over a block."""

    features: Tensor
    """[states, block, features] fp32."""
    masked: Tensor
    """[states, block] boolean."""
    right: Tensor
    """[states, block] boolean: whether the token that the forward gives is the reference's."""

    def __len__(self) -> int:
        return len(self.masked)

    def __getitem__(self, index: Tensor) -> Self:
        return type(self)(*(getattr(self, field.name)[index] for field in fields(self)))

    @classmethod
    def joined(cls, parts: Sequence[Self]) -> Self:
        """Return all states of several records."""
        return cls(*(torch.cat([getattr(part, field.name) for part in parts]) for field in fields(cls)))


def fit(
    network: SlotNetwork,
    states: States,
    *,
    steps: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
) -> Iterator[float]:
    """Train a network, in place, to say which tokens are right, and yield the loss of each step.

    Args:
        network: On the device that it trains on.
        states: What it learns from; they may be on another device.
        steps: Optimizer steps, AdamW with a linear warm-up and a cosine to 0.
        batch_size: States of a step, drawn without replacement until all have been seen.
        learning_rate: The largest.
        seed: Seed of the draws.

    Yields:
        Nats per masked slot.
    """
    device = next(network.parameters()).device
    optimizer = torch.optim.AdamW(network.parameters(), lr=learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, learning_rate, total_steps=steps + 1, pct_start=_WARM_UP, cycle_momentum=False
    )
    draw = torch.Generator().manual_seed(seed)
    order = torch.empty(0, dtype=torch.long)
    network.train()
    for _ in range(steps):
        while len(order) < batch_size:
            order = torch.cat([order, torch.randperm(len(states), generator=draw)])
        batch, order = states[order[:batch_size]], order[batch_size:]
        loss = slot_loss(network, batch, device)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        yield loss.item()
    network.eval()


def slot_loss(log_odds: Callable[[Tensor], Tensor], states: States, device: torch.device) -> Tensor:
    """Return the mean binary cross-entropy over masked slots, in nats, of log-odds that tokens are right."""
    features, masked, right = (values.to(device) for values in (states.features, states.masked, states.right))
    return F.binary_cross_entropy_with_logits(log_odds(features)[masked], right[masked].float())
