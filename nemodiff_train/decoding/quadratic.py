"""Quadratic self-speculation: one forward verifies a draft and drafts after each of its tokens."""

from collections.abc import Sequence

import torch
from torch import Tensor

from nemodiff_train.decoding.generation import Generation
from nemodiff_train.decoding.linear import commit_accepted
from nemodiff_train.decoding.sampling import TokenSampler, rejection_sample
from nemodiff_train.decoding.session import Session, TokenLayout, drop_finished


def decode_quadratic(session: Session, prompts: Sequence[Sequence[int]], sampler: TokenSampler) -> list[Generation]:
    """Verify and draft in the same forward until every row has ended.

    The input is a tree, as in TiDAR (arXiv 2511.08923) and Nemotron-Labs-Diffusion (arXiv 2607.05722, section 3).
    Its trunk is the chain of the last known token and the draft after it; on each token of the chain hangs a
    group of masks.  The chain is causal, which verifies it; a group sees the chain up to its token, and itself.
    Wherever the accepted part of the chain ends, the group on its last token holds the next draft.  So a cycle is
    one forward, over (block - 1) * block tokens.

    Args:
        session: One row per prompt, nothing committed.
        prompts: Token ids of each prompt.
        sampler: Chooses tokens; its settings give the block size.

    Returns:
        One generation per prompt, equal to AR decoding's at temperature 0 and distributed as that above it.
    """
    rows = [Generation(sampler.settings) for _ in prompts]
    active = torch.arange(len(rows))
    masks = sampler.settings.block_size - 1  # length of the chain and of each group; drafts have one token less
    logits, draft_logits = _prefill(session, prompts, masks)
    last = sampler.sample_tokens(logits[:, None], active)  # [batch, 1]
    session.emit(rows, active, last)
    layout = _chain_and_groups(masks, session.device)
    while True:
        active, last, draft_logits = drop_finished(rows, active, last, draft_logits)
        if not len(active):
            return rows
        draft_tokens = sampler.sample_tokens(draft_logits, active)  # [batch, masks - 1]
        chain = torch.cat([last, draft_tokens], dim=1)
        tokens = torch.cat([chain, session.masks(len(active), masks * masks)], dim=1)
        logits = session.forward(tokens, active, "fused", layout=layout)
        # The chain's logits verify the draft.
        verification = rejection_sample(sampler, draft_tokens, draft_logits, logits[:, :masks], active)
        last = commit_accepted(session, rows, active, verification)
        # The groups' logits [batch, group, mask, vocab]; the group on the last accepted token holds the next draft.
        groups = logits[:, masks:].unflatten(1, (masks, masks))
        draft_logits = _drafting(session, groups[torch.arange(len(active)), verification.accepted])


def _drafting(session: Session, group: Tensor) -> Tensor:
    """Return the logits [batch, masks - 1, vocab] of a group [batch, masks, vocab] that draft.

    Its first mask is the known token that verification gives; the draft comes after it.
    """
    return group[:, :-1] if session.model.config.shift else group[:, 1:]


def _prefill(session: Session, prompts: Sequence[Sequence[int]], masks: int) -> tuple[Tensor, Tensor]:
    """Commit the prompts and draft after them, in one forward.

    Returns the logits after each prompt's last token [rows, vocab], and of the first draft [rows, masks - 1, vocab].
    """
    counts = torch.tensor([len(prompt) for prompt in prompts])
    width, lengths = int(counts.max()), session.cache.to_device(counts)
    # Each row is its prompt, padded to ``width``, then the group of masks.
    tokens = session.masks(len(prompts), width + masks)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = torch.tensor(prompt)
    index = torch.arange(width + masks, device=session.device)
    is_mask = index >= width
    # Positions [rows, width + masks]: the masks follow each prompt's own end.
    offsets = torch.where(is_mask, lengths[:, None] + index - width, index)
    # Attention [rows, query, key]: the prompt is causal; a mask sees its whole prompt and every mask.
    in_prompt = index < lengths[:, None]
    causal = (index[None, :] <= index[:, None]) & ~is_mask[None, :]
    can_attend = torch.where(is_mask[:, None], (in_prompt | is_mask)[:, None, :], causal)
    rows = torch.arange(len(prompts))
    indices = torch.cat([lengths[:, None] - 1, index[None, width:].expand(len(prompts), -1)], dim=1)
    layout = TokenLayout(offsets, can_attend, width + masks)
    logits = session.forward(tokens, rows, "prefill", layout=layout, indices=indices)
    session.commit(rows, counts)
    return logits[:, 0], _drafting(session, logits[:, 1:])


def _chain_and_groups(masks: int, device: torch.device) -> TokenLayout:
    """Return the layout of a chain of ``masks`` tokens, then one group of ``masks`` masks on each of them.

    With masks = 2, a chain c, group a on c0 and group b on c1::

        token     c0 c1 a0 a1 b0 b1
        position   0  1  1  2  2  3

    a sees c0 and a; b sees c0, c1 and b.
    """
    chain = torch.arange(masks, device=device)
    anchor = torch.cat([chain, chain.repeat_interleave(masks)])  # [new] the chain's token that each belongs to
    depth = torch.cat([torch.zeros_like(chain), 1 + chain.repeat(masks)])  # [new] distance from it; 0 in the chain
    in_chain = depth == 0
    # [query, key]: the chain up to the query's anchor, and within one group everything.
    same_group = (anchor[:, None] == anchor[None, :]) & ~in_chain[:, None] & ~in_chain[None, :]
    can_attend = (in_chain[None, :] & (anchor[None, :] <= anchor[:, None])) | same_group
    return TokenLayout((anchor + depth)[None], can_attend[None], 2 * masks)
