"""The drafter's loss: how far the draft's distributions are from those that verify them."""

from dataclasses import dataclass

import torch
from torch import Tensor

from nemodiff_train.drafter.config import DrafterConfig

# In place of minus infinity, which times a probability of 0 would be no number.
NEVER = -1e30


def slot_losses(draft: Tensor, verifier: Tensor, config: DrafterConfig) -> Tensor:
    """The loss of each slot (Nemotron-Labs-Diffusion, section 3.3).

    On the union of both most probable ``config.support`` tokens, renormalized::

        lambda KL(p || q) + (1 - lambda) TV(p, q) - log q_1(argmax p),  lambda = exp(-(1 - TV) / 2)

    p and q are at ``config.temperature``, q_1 at 1.  1 - TV is the probability that a token drawn from q is
    accepted; no gradient passes through lambda.

    Args:
        draft: [..., vocab] logits of q.
        verifier: [..., vocab] logits of p; no gradient is taken of them.
        config: The switches.

    Returns:
        [...] nats, in the logits' dtype.
    """
    draft, verifier, choice = _on_support(draft, verifier.detach(), config.support)
    of_choice = -draft.log_softmax(-1).gather(-1, choice)[..., 0]
    if config.loss == "cross_entropy":
        return of_choice
    p, q = ((logits / config.temperature).log_softmax(-1) for logits in (verifier, draft))
    divergence = (p.exp() * (p - q)).sum(-1)
    variation = (p.exp() - q.exp()).abs().sum(-1) / 2
    share = torch.exp(-0.5 * (1 - variation.detach()))
    return share * divergence + (1 - share) * variation + of_choice


def _on_support(draft: Tensor, verifier: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Both logits on the union of their largest, a token that both have once; and where p's largest is, [..., 1]."""
    size = min(size, draft.shape[-1])
    of_verifier, of_draft = (logits.topk(size, dim=-1).indices for logits in (verifier, draft.detach()))
    known = torch.zeros_like(draft, dtype=torch.bool).scatter_(-1, of_verifier, True)
    again = torch.cat([torch.zeros_like(of_verifier, dtype=torch.bool), known.gather(-1, of_draft)], dim=-1)
    tokens = torch.cat([of_verifier, of_draft], dim=-1)
    on = [logits.gather(-1, tokens).masked_fill(again, NEVER) for logits in (draft, verifier)]
    return on[0], on[1], on[1].argmax(-1, keepdim=True)


@dataclass(frozen=True)
class Slots:
    """What became of each slot of some drafts."""

    weights: Tensor
    """[drafts, k] weight of each slot's loss."""
    counted: Tensor
    """[drafts, k] whether it counts."""
    kept: Tensor
    """[drafts, k] whether greedy decoding would have accepted it and all before it."""


def judge(draft: Tensor, verifier: Tensor, usable: Tensor, uniform: Tensor, config: DrafterConfig) -> Slots:
    """Which slots of each draft decoding would reach.

    A token drawn from q is the verifier's choice with the probability that q gives to it: nothing need be drawn but
    whether it is.

    Args:
        draft: [drafts, k, vocab] logits of q.
        verifier: [drafts, k, vocab] logits of p.
        usable: [drafts, k] whether the data have a target there.
        uniform: [drafts, k, 2] numbers in [0, 1): one for whether a slot is drawn or greedy, one for the draw.
        config: The switches.
    """
    choice = verifier.argmax(-1)
    agrees = draft.argmax(-1) == choice
    probability = draft.softmax(-1).gather(-1, choice[..., None])[..., 0]
    drawn = uniform[..., 0] < config.sampled_share
    accepted = torch.where(drawn, uniform[..., 1] < probability, agrees)
    usable = usable.long().cumprod(-1).bool()
    before = torch.ones_like(usable)
    before[:, 1:] = accepted.long().cumprod(-1).bool()[:, :-1]
    counted = usable & before if config.slots == "visited" else usable
    weights = counted.to(draft.dtype)
    if config.position_decay:
        place = torch.arange(draft.shape[1], device=draft.device)
        weights = weights * torch.exp(-place / config.position_decay)
    return Slots(weights, counted, (agrees & usable).long().cumprod(-1).bool())
