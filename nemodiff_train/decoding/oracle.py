"""The speed of light: the most tokens per forward that drafts could give if it were known which are right."""

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from nemodiff_train.decoding.ar import decode_ar
from nemodiff_train.decoding.generation import Cycle, Generation
from nemodiff_train.decoding.sampling import Sampler
from nemodiff_train.decoding.session import Session
from nemodiff_train.errors import UserError


def decode_oracle(session: Session, prompts: Sequence[Sequence[int]], sampler: Sampler) -> list[Generation]:
    """Find the fewest denoising forwards that could have produced the AR output (Nemotron-Labs-Diffusion, section 4).

    The AR output is decoded first.  A cycle starts behind any of its tokens with a block of masks.  Each
    forward reveals every place it has right.  The cycle may stop after any forward: it has then gained the
    revealed tokens up to the first gap, and one more, which verification gives for nothing when it shares
    the forward with the next draft, as in ``quadratic``.  A cycle may also be one of ``quadratic``, which
    drafts before its first token is known.  The shortest path over all cycles is the result: what knowing
    the output would give, not a way to decode.  It takes no more forwards than ``linear`` or
    ``quadratic``; that revealing fewer places could never help is not proven.

    A record's forwards are the path's.  What the search took is counted as ``search``.
    """
    if not sampler.greedy:
        raise UserError("mode 'oracle' looks for the way to the greedy output; set the temperature to 0")
    depth = sampler.settings.search_budget // sampler.settings.max_new_tokens - 2
    if depth < 1:
        raise UserError(
            f"search budget is {sampler.settings.search_budget}; mode 'oracle' needs three forwards for each of "
            f"{sampler.settings.max_new_tokens} new tokens"
        )
    ar = Session(session.model.chunks, len(prompts), session.cache.capacity, session.mask_token_id)
    targets = [generation.tokens for generation in decode_ar(ar, prompts, sampler)]
    session.prefill(prompts)
    starts = session.cache.lengths.clone()
    for row, calls in enumerate(ar.forwards):
        session.forwards[row]["search"] += calls.total()
    _fill_cache(session, targets)
    gains = _gains(session, targets, starts, sampler.settings.block_size, depth)
    rows = []
    for target, gain in zip(targets, gains, strict=True):
        cycles = _shortest_path(gain, len(target))
        generation = Generation(sampler.settings, path=sum(forwards for forwards, _ in cycles))
        generation.extend(target[:1], [1])
        call = 1
        for forwards, gained in cycles:
            call += forwards
            done = len(generation.tokens)
            generation.extend(target[done : done + gained], [call] * gained)
            generation.cycles.append(Cycle(accepted=gained - 1, recovered=True))
        rows.append(generation)
    return rows


def _fill_cache(session: Session, targets: list[list[int]]) -> None:
    """Write the AR output behind the prompts, so that a block can be put behind any of its tokens."""
    rows = torch.arange(len(targets), device=session.device)
    padded = torch.zeros(len(targets), max(map(len, targets)), dtype=torch.long, device=session.device)
    for row, target in enumerate(targets):
        padded[row, : len(target)] = torch.tensor(target)
    session.forward(padded, rows, "search", causal=True)


def _gains(
    session: Session, targets: list[list[int]], starts: Tensor, block_size: int, depth: int
) -> list[list[list[int]]]:
    """For each row and each token of its output, what a cycle behind it gains after 1, 2, ... forwards.

    Args:
        targets: The AR output of each row.
        starts: [rows] length of each prompt.
        depth: Most forwards over one block.
    """
    gains: list[list[list[int]]] = [[[] for _ in target] for target in targets]
    longest = max(map(len, targets))
    for anchor in range(longest - 2, -1, -1):  # from the end: a block overwrites the cache behind its anchor
        rows = [row for row, target in enumerate(targets) if anchor < len(target) - 1]
        index = torch.tensor(rows, device=session.device)
        session.cache.lengths[index] = starts[index] + anchor
        block = torch.full((len(rows), block_size), -1, device=session.device)
        for place, row in enumerate(rows):
            known = targets[row][anchor : anchor + block_size]
            block[place, : len(known)] = torch.tensor(known)
        unseen = _draft_unseen(session, index, block)
        for row, found, drafted in zip(rows, _reveal(session, index, block, depth), unseen, strict=True):
            found[0] = max(found[0], drafted)
            gains[row][anchor] = [min(gain, len(targets[row]) - 1 - anchor) for gain in found]
    return gains


def _draft_unseen(session: Session, rows: Tensor, target: Tensor) -> list[int]:
    """What a cycle of ``quadratic`` gains for each row: its draft is made before the block's first token is known.

    Args:
        target: [batch, block] as for :func:`_reveal`.
    """
    assert session.mask_token_id is not None  # decode() refuses models without one
    masks = torch.full_like(target[:, 1:], session.mask_token_id)
    choice = session.forward(masks, rows, "search", causal=False).argmax(-1)
    right = choice[:, 1:] == target[:, 1:-1]
    gained: list[int] = (1 + right.long().cumprod(1).sum(1)).tolist()
    return gained


def _reveal(session: Session, rows: Tensor, target: Tensor, depth: int) -> list[list[int]]:
    """Denoise a block, keeping every right place, until nothing changes or ``depth`` forwards are spent.

    Args:
        target: [batch, block] the right tokens, the known first one included; -1 behind the end.

    Returns:
        For each row, tokens gained after each forward: those up to the first gap, and one more.
    """
    assert session.mask_token_id is not None  # decode() refuses models without one
    known = torch.zeros_like(target, dtype=torch.bool)
    known[:, 0] = True
    found: list[list[int]] = [[] for _ in rows]
    open_rows = torch.arange(len(rows), device=rows.device)
    for _ in range(depth):
        block = torch.where(known, target, session.mask_token_id)[open_rows]
        choice = session.forward(block, rows[open_rows], "search", causal=False).argmax(-1)
        before = known[open_rows]
        known[open_rows] = before | (choice == target[open_rows])
        gained = known[open_rows].long().cumprod(1).sum(1)
        for place, gain in zip(open_rows.tolist(), gained.tolist(), strict=True):
            found[place].append(gain)
        open_rows = open_rows[(known[open_rows] != before).any(1) & ~known[open_rows].all(1)]
        if not len(open_rows):
            break
    return found


def _shortest_path(gains: list[list[int]], length: int) -> list[tuple[int, int]]:
    """Cycles (forwards, tokens gained) from the first token to the last with the fewest forwards.

    A cycle may keep less than it gained, where the next one does better from an earlier token.
    """
    cost, step = [0] * length, [(0, 0)] * length
    for anchor in range(length - 2, -1, -1):
        cost[anchor], forwards, less = min(
            (forwards + cost[anchor + kept], forwards, -kept)
            for forwards, gain in enumerate(gains[anchor], 1)
            for kept in range(1, gain + 1)
        )
        step[anchor] = (forwards, -less)
    cycles, anchor = [], 0
    while anchor < length - 1:
        cycles.append(step[anchor])
        anchor += step[anchor][1]
    return cycles


def path_forwards(generation: Generation, counted: Counter[str]) -> dict[str, int]:
    """What a record shows: the forwards that were made, or those of an oracle's path beside its search."""
    if generation.path is None:
        return dict(counted)
    return {"prefill": counted["prefill"], "denoise": generation.path, "search": counted["search"]}
