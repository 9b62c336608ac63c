"""Quadratic self-speculation: one forward verifies a draft and drafts behind each of its tokens."""

from collections.abc import Sequence

import torch
from torch import Tensor

from nemodiff_train.decoding.generation import Generation
from nemodiff_train.decoding.linear import commit_accepted
from nemodiff_train.decoding.sampling import Sampler, verify
from nemodiff_train.decoding.session import Layout, Session


def decode_quadratic(session: Session, prompts: Sequence[Sequence[int]], sampler: Sampler) -> list[Generation]:
    """Verify and draft in the same forward until every row has ended (TiDAR; Nemotron-Labs-Diffusion, section 3).

    The input is a chain, the last certain token and what was drafted behind it, and behind each token of the
    chain a group of masks.  The chain is causal, which verifies it; a group sees the chain up to its
    token and itself.  Whichever part of the chain is kept, the group behind its last token holds the next
    draft.  So a cycle is one forward, over about block x block tokens.
    """
    rows = [Generation(sampler.settings) for _ in prompts]
    active = torch.arange(len(rows), device=session.device)
    masks = sampler.settings.block_size - 1
    logits, guess = _prefill(session, prompts, masks)
    last = sampler.sample_tokens(logits[:, None], active)
    for row, token in enumerate(last[:, 0].tolist()):
        rows[row].extend([token], [session.calls(row)])
    layout = _chain_and_groups(masks, session.device)
    while True:
        running = torch.tensor([not rows[row].finished for row in active.tolist()], device=session.device)
        active, last, guess = active[running], last[running], guess[running]
        if not len(active):
            return rows
        draft = sampler.sample_tokens(guess, active)
        tokens = last.new_full((len(active), masks * (masks + 1)), session.mask_token_id or 0)
        tokens[:, :masks] = torch.cat([last, draft], dim=1)
        logits = session.forward(tokens, active, "fused", layout=layout)
        verified = verify(sampler, draft, guess, logits[:, :masks], active)
        last, counts = commit_accepted(session, rows, active, verified, draft)
        groups = logits[:, masks:].unflatten(1, (masks, masks))
        guess = _drafting(session, groups[torch.arange(len(active)), counts - 1])


def _drafting(session: Session, group: Tensor) -> Tensor:
    """Of a group's logits, those that draft: the first masked place is the certain token that verification gave.

    Args:
        group: [batch, masks, vocab].

    Returns:
        [batch, masks - 1, vocab] for the places behind that token.
    """
    return group[:, :-1] if session.model.config.shift else group[:, 1:]


def _prefill(session: Session, prompts: Sequence[Sequence[int]], masks: int) -> tuple[Tensor, Tensor]:
    """Commit the prompts and draft behind them, in one forward.

    Returns:
        Logits after each prompt's last token [rows, vocab], and of the first draft [rows, masks - 1, vocab].
    """
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=session.device)
    width = int(lengths.max())
    tokens = lengths.new_full((len(prompts), width + masks), session.mask_token_id or 0)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = torch.tensor(prompt)
    place = torch.arange(width + masks, device=session.device)
    is_mask = place >= width
    offsets = torch.where(is_mask, lengths[:, None] + place - width, place)
    in_prompt = place < lengths[:, None]
    causal = (place[None, :] <= place[:, None]) & ~is_mask[None, :]
    sees = torch.where(is_mask[:, None], (in_prompt | is_mask)[:, None, :], causal)
    rows = torch.arange(len(prompts), device=session.device)
    wanted = torch.cat([lengths[:, None] - 1, place[None, width:].expand(len(prompts), -1)], dim=1)
    logits = session.forward(tokens, rows, "prefill", layout=Layout(offsets, sees), places=wanted)
    session.commit(rows, lengths)
    return logits[:, 0], _drafting(session, logits[:, 1:])


def _chain_and_groups(masks: int, device: torch.device) -> Layout:
    """A chain of as many tokens as a group has masks, then a group behind each."""
    chain = torch.arange(masks, device=device)
    token = torch.cat([chain, chain.repeat_interleave(masks)])  # the chain's token that each place belongs to
    inside = torch.cat([torch.zeros_like(chain), 1 + chain.repeat(masks)])  # how far behind it
    in_chain = inside == 0
    same_group = (token[:, None] == token[None, :]) & ~in_chain[:, None] & ~in_chain[None, :]
    sees = (in_chain[None, :] & (token[None, :] <= token[:, None])) | same_group
    return Layout((token + inside)[None], sees[None])
