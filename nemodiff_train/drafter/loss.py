"""The drafter's loss: how far the draft's distributions are from those that verify them."""

import torch
from torch import Tensor

from nemodiff_train.drafter.config import DrafterConfig

NEVER = -1e30
"""Logit of a token that is never chosen.  Minus infinity times a probability of 0 would be NaN."""


def slot_losses(draft: Tensor, verifier: Tensor, config: DrafterConfig) -> Tensor:
    """Return the loss of each slot (Nemotron-Labs-Diffusion, arXiv 2607.05722, section 3.3).

    On the union of both most probable ``config.support`` tokens, renormalized, ``lk_hybrid`` is::

        lambda KL(p || q) + (1 - lambda) TV(p, q) - log q_1(argmax p),  lambda = exp(-(1 - TV) / 2)

    p and q are at ``config.temperature``, q_1 at 1.  1 - TV is the probability that a token drawn from q is
    accepted; no gradient passes through lambda.  The other losses are ``kl``, KL(p || q); ``total_variation``,
    TV(p, q) (Uno, arXiv 2609.04010); and ``cross_entropy``, the last term.

    Args:
        draft: [..., vocabulary] logits of q.
        verifier: [..., vocabulary] logits of p; they get no gradient.
        config: The switches.

    Returns:
        [...] nats (a fraction for ``total_variation``), in the logits' dtype.
    """
    # Logits on the union of supports, [..., tokens], and the index of the verifier's choice there, [..., 1].
    draft, verifier, choice = _on_support(draft, verifier.detach(), config.support)
    if config.loss == "cross_entropy":
        return _cross_entropy(draft, choice)
    p, q = ((logits / config.temperature).log_softmax(-1) for logits in (verifier, draft))
    if config.loss == "kl":
        return _kl(p, q)
    variation = (p.exp() - q.exp()).abs().sum(-1) / 2
    if config.loss == "total_variation":
        return variation
    weight = torch.exp(-0.5 * (1 - variation.detach()))  # lambda
    return weight * _kl(p, q) + (1 - weight) * variation + _cross_entropy(draft, choice)


def _cross_entropy(draft: Tensor, choice: Tensor) -> Tensor:
    """Return -log q_1 of the verifier's choice, [...]."""
    return -draft.log_softmax(-1).gather(-1, choice)[..., 0]


def _kl(p: Tensor, q: Tensor) -> Tensor:
    """Return KL(p || q), [...], of logarithms of probabilities."""
    return (p.exp() * (p - q)).sum(-1)


def _on_support(draft: Tensor, verifier: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return both logits on the union of their largest, and the index of the verifier's largest among them, [..., 1].

    A token that both have among their largest is there twice; the second time with logits of ``NEVER``.
    """
    if not 0 < size < draft.shape[-1]:
        return draft, verifier, verifier.argmax(-1, keepdim=True)
    of_verifier, of_draft = (logits.topk(size, dim=-1).indices for logits in (verifier, draft.detach()))
    in_verifier = torch.zeros_like(draft, dtype=torch.bool).scatter_(-1, of_verifier, True)
    repeated = torch.cat([torch.zeros_like(of_verifier, dtype=torch.bool), in_verifier.gather(-1, of_draft)], dim=-1)
    tokens = torch.cat([of_verifier, of_draft], dim=-1)
    on_support = [logits.gather(-1, tokens).masked_fill(repeated, NEVER) for logits in (draft, verifier)]
    return on_support[0], on_support[1], on_support[1].argmax(-1, keepdim=True)


def simulate_acceptance(
    draft: Tensor, verifier: Tensor, uniform: Tensor, config: DrafterConfig
) -> tuple[Tensor, Tensor]:
    """Simulate which drafted tokens the verifier accepts.

    A token drawn from q is the verifier's choice with the probability that q gives to it: the token need not be
    drawn, only whether it is that one.

    Args:
        draft: [..., vocabulary] logits of q.
        verifier: [..., vocabulary] logits of p.
        uniform: [..., 2] numbers in [0, 1): one for whether a slot is drawn or greedy, one for the draw.
        config: The switches.

    Returns:
        [...] whether the greedy draft is the verifier's choice; [...] whether the draft, drawn or greedy, is.
    """
    choice = verifier.argmax(-1)
    agrees = draft.argmax(-1) == choice
    probability = draft.softmax(-1).gather(-1, choice[..., None])[..., 0]
    drawn = uniform[..., 0] < config.sampled_fraction
    return agrees, torch.where(drawn, uniform[..., 1] < probability, agrees)
