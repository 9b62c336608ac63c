"""The drafter's loss: how far the draft's distributions are from those that verify them."""

from dataclasses import dataclass

import torch
from torch import Tensor

from nemodiff_train.drafter.config import DrafterConfig

NEVER = -1e30
"""Logit of a token that is never chosen.  Minus infinity times a probability of 0 would be NaN."""


def slot_losses(draft: Tensor, verifier: Tensor, config: DrafterConfig) -> Tensor:
    """Return the loss of each slot (Nemotron-Labs-Diffusion, arXiv 2607.05722, section 3.3).

    On the union of both most probable ``config.support`` tokens, renormalized::

        lambda KL(p || q) + (1 - lambda) TV(p, q) - log q_1(argmax p),  lambda = exp(-(1 - TV) / 2)

    p and q are at ``config.temperature``, q_1 at 1.  1 - TV is the probability that a token drawn from q is
    accepted; no gradient passes through lambda.

    Args:
        draft: [..., vocabulary] logits of q.
        verifier: [..., vocabulary] logits of p; they get no gradient.
        config: The switches.

    Returns:
        [...] nats, in the logits' dtype.
    """
    # Logits on the union of supports, [..., 2 * support], and the index of the verifier's choice there, [..., 1].
    draft, verifier, choice = _on_support(draft, verifier.detach(), config.support)
    cross_entropy = -draft.log_softmax(-1).gather(-1, choice)[..., 0]
    if config.loss == "cross_entropy":
        return cross_entropy
    p, q = ((logits / config.temperature).log_softmax(-1) for logits in (verifier, draft))
    kl = (p.exp() * (p - q)).sum(-1)
    tv = (p.exp() - q.exp()).abs().sum(-1) / 2
    weight = torch.exp(-0.5 * (1 - tv.detach()))  # lambda
    return weight * kl + (1 - weight) * tv + cross_entropy


def _on_support(draft: Tensor, verifier: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return both logits on the union of their largest, and the index of the verifier's largest among them, [..., 1].

    A token that both have among their largest is there twice; the second time with logits of ``NEVER``.
    """
    size = min(size, draft.shape[-1])
    of_verifier, of_draft = (logits.topk(size, dim=-1).indices for logits in (verifier, draft.detach()))
    in_verifier = torch.zeros_like(draft, dtype=torch.bool).scatter_(-1, of_verifier, True)
    repeated = torch.cat([torch.zeros_like(of_verifier, dtype=torch.bool), in_verifier.gather(-1, of_draft)], dim=-1)
    tokens = torch.cat([of_verifier, of_draft], dim=-1)
    on_support = [logits.gather(-1, tokens).masked_fill(repeated, NEVER) for logits in (draft, verifier)]
    return on_support[0], on_support[1], on_support[1].argmax(-1, keepdim=True)


@dataclass(frozen=True)
class Slots:
    """The outcome of each slot of some drafts of k tokens."""

    weights: Tensor
    """[drafts, k] weight of each slot's loss."""
    counted: Tensor
    """[drafts, k] whether it counts."""
    accepted: Tensor
    """[drafts, k] whether greedy decoding would have accepted it and all before it."""


def judge(draft: Tensor, verifier: Tensor, usable: Tensor, uniform: Tensor, config: DrafterConfig) -> Slots:
    """Find the slots of each draft that decoding would reach.

    A token drawn from q is the verifier's choice with the probability that q gives to it: the token need not be
    drawn, only whether it is that one.

    Args:
        draft: [drafts, k, vocabulary] logits of q.
        verifier: [drafts, k, vocabulary] logits of p.
        usable: [drafts, k] whether the data have a target there.
        uniform: [drafts, k, 2] numbers in [0, 1): one for whether a slot is drawn or greedy, one for the draw.
        config: The switches.
    """
    choice = verifier.argmax(-1)
    agrees = draft.argmax(-1) == choice
    probability = draft.softmax(-1).gather(-1, choice[..., None])[..., 0]
    drawn = uniform[..., 0] < config.sampled_share
    accepted = torch.where(drawn, uniform[..., 1] < probability, agrees)

    # A slot counts if all slots before it were accepted, and the text goes on to there.
    usable = usable.long().cumprod(-1).bool()
    reached = torch.ones_like(usable)
    reached[:, 1:] = accepted.long().cumprod(-1).bool()[:, :-1]
    counted = usable & reached if config.slots == "visited" else usable
    weights = counted.to(draft.dtype)
    if config.position_decay:
        index = torch.arange(draft.shape[1], device=draft.device)
        weights = weights * torch.exp(-index / config.position_decay)
    return Slots(weights, counted, (agrees & usable).long().cumprod(-1).bool())
