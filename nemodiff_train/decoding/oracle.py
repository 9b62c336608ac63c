"""The speed of light: the most tokens per forward that drafts could give if it were known which are right."""

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from nemodiff_train.decoding.ar import decode_ar
from nemodiff_train.decoding.generation import Cycle, Generation
from nemodiff_train.decoding.sampling import TokenSampler
from nemodiff_train.decoding.session import Session
from nemodiff_train.errors import UserError


def decode_oracle(session: Session, prompts: Sequence[Sequence[int]], sampler: TokenSampler) -> list[Generation]:
    """Find the fewest denoising forwards that could have produced the AR output.

    This is the analysis of Nemotron-Labs-Diffusion (arXiv 2607.05722, section 4).  The AR output is decoded first.
    A cycle starts after any of its tokens with a block of masks, and each forward reveals every position that it has
    right.  The cycle may stop after any forward: it has then gained the revealed tokens up to the first gap, and one
    more, which verification gives for free when it shares the forward with the next draft, as in ``quadratic``.  A
    cycle may also be one of ``quadratic``, which drafts before its first token is known.  The shortest path over all
    cycles is the result: what knowing the output would give, not a way to decode.  It takes no more forwards than
    ``linear`` or ``quadratic``; that revealing fewer positions could never help is not proven.

    A record's forwards are the path's; those of the search are counted as ``search``.

    Args:
        session: One row per prompt, nothing committed.
        prompts: Token ids of each prompt.
        sampler: Its settings give block size and search budget.

    Returns:
        One generation per prompt, its tokens those of AR decoding.

    Raises:
        UserError: The temperature is not 0, or the search budget is too small.
    """
    if not sampler.greedy:
        raise UserError("mode 'oracle' looks for the way to the greedy output; set the temperature to 0")
    # Per new token: one forward of AR, one of a quadratic cycle, and this many over one block.
    depth = sampler.settings.search_budget // sampler.settings.max_new_tokens - 2
    if depth < 1:
        raise UserError(
            f"search_budget is {sampler.settings.search_budget}; mode 'oracle' needs three forwards for each of "
            f"{sampler.settings.max_new_tokens} new tokens"
        )
    ar = Session(session.model.chunks, len(prompts), session.cache.capacity, session.mask_token_id)
    targets = [generation.tokens for generation in decode_ar(ar, prompts, sampler)]
    session.prefill(prompts)
    prompt_lengths = session.cache.lengths.clone()
    for row, calls in enumerate(ar.forwards):
        session.forwards[row]["search"] += calls.total()
    # Write the AR output [rows, longest] to the cache after the prompts: a block can follow any of its tokens.
    padded = pad_sequence([torch.tensor(target) for target in targets], batch_first=True)
    session.forward(session.cache.to_device(padded), torch.arange(len(targets)), "search", causal=True)
    gains = _gains(session, targets, prompt_lengths, sampler.settings.block_size, depth)
    return [_along_path(sampler, target, gain) for target, gain in zip(targets, gains, strict=True)]


def _along_path(sampler: TokenSampler, target: list[int], gains: list[list[int]]) -> Generation:
    """Return the generation of one row: its AR output, in the cycles of the shortest path."""
    path = _shortest_path(gains, len(target))
    generation = Generation(sampler.settings, oracle_forwards=sum(forwards for forwards, _ in path))
    generation.extend(target[:1], [1])
    call = 1
    for forwards, gained in path:
        call += forwards
        done = len(generation.tokens)
        generation.extend(target[done : done + gained], [call] * gained)
        generation.cycles.append(Cycle(accepted=gained - 1, recovered=True))
    return generation


def _gains(
    session: Session, targets: list[list[int]], prompt_lengths: Tensor, block_size: int, depth: int
) -> list[list[list[int]]]:
    """Return for each row and each token of its output what a cycle after it gains after 1, 2, ... forwards.

    The session holds prompts, of ``prompt_lengths`` [rows] tokens, and outputs in its cache.
    """
    gains: list[list[list[int]]] = [[[] for _ in target] for target in targets]
    longest = max(map(len, targets))
    for anchor in range(longest - 2, -1, -1):  # from the end: a block overwrites the cache after its anchor
        rows = [row for row, target in enumerate(targets) if anchor < len(target) - 1]
        index = torch.tensor(rows)
        session.cache.lengths[index] = prompt_lengths[index] + anchor
        # [batch, block] the tokens to reveal, from the anchor on; -1 after the end of an output.
        block = torch.full((len(rows), block_size), -1)
        for number, row in enumerate(rows):
            tokens = targets[row][anchor : anchor + block_size]
            block[number, : len(tokens)] = torch.tensor(tokens)
        block = session.cache.to_device(block)
        # A cycle of ``quadratic`` drafts before the block's first token is known; [batch] what it gains.
        masks = session.masks(len(rows), block_size - 1)
        choice = session.forward(masks, index, "search", causal=False).argmax(-1)  # [batch, block - 1]
        fused = 1 + (choice[:, 1:] == block[:, 1:-1]).long().cumprod(1).sum(1)
        revealed = _reveal(session, index, block, depth)
        for row, by_forwards, by_fused in zip(rows, revealed, fused.tolist(), strict=True):
            by_forwards[0] = max(by_forwards[0], by_fused)
            gains[row][anchor] = [min(gain, len(targets[row]) - 1 - anchor) for gain in by_forwards]
    return gains


def _reveal(session: Session, rows: Tensor, target: Tensor, depth: int) -> list[list[int]]:
    """Denoise a block, keeping every right position, until nothing changes or ``depth`` forwards are spent.

    The cache of the rows [batch] ends before the block.  ``target`` [batch, block] has the right tokens, the known
    first one included, and -1 after the end of the output.  Returns for each row the tokens gained after each
    forward: those up to the first gap, and one more.
    """
    assert session.mask_token_id is not None  # decode() refuses models without one
    known = torch.zeros_like(target, dtype=torch.bool)  # [batch, block]
    known[:, 0] = True
    gains: list[list[int]] = [[] for _ in rows]
    unfinished = torch.arange(len(rows))
    for _ in range(depth):
        # One forward over the known tokens and masks; every right choice [open, block] becomes known.
        block = torch.where(known, target, session.mask_token_id)[unfinished]
        choice = session.forward(block, rows[unfinished], "search", causal=False).argmax(-1)
        before = known[unfinished]
        known[unfinished] = before | (choice == target[unfinished])
        # The known first token is not a gain, but the token that verification gives is: the counts are equal.
        gained = known[unfinished].long().cumprod(1).sum(1)
        for row, gain in zip(unfinished.tolist(), gained.tolist(), strict=True):
            gains[row].append(gain)
        unfinished = unfinished[((known[unfinished] != before).any(1) & ~known[unfinished].all(1)).cpu()]
        if not len(unfinished):
            break
    return gains


def _shortest_path(gains: list[list[int]], length: int) -> list[tuple[int, int]]:
    """Return the cycles with the fewest forwards from the first token to the last, as (forwards, tokens gained).

    A cycle may keep less than it gained (``gains``, by token and forward), where the next one does better from an
    earlier token.
    """
    # Dynamic programming from the end: cost[i] is the fewest forwards from token i to the last.
    cost, best = [0] * length, [(0, 0)] * length
    for anchor in range(length - 2, -1, -1):
        cost[anchor], forwards, minus_kept = min(  # among equal costs, few forwards, then many tokens
            (forwards + cost[anchor + kept], forwards, -kept)
            for forwards, gain in enumerate(gains[anchor], 1)
            for kept in range(1, gain + 1)
        )
        best[anchor] = (forwards, -minus_kept)
    cycles, anchor = [], 0
    while anchor < length - 1:
        cycles.append(best[anchor])
        anchor += best[anchor][1]
    return cycles


def path_forwards(generation: Generation, counted: Counter[str]) -> dict[str, int]:
    """Return the forwards of a record: those that were made, or those of an oracle's path beside its search.

    Args:
        generation: One row's.
        counted: Forwards that the session counted for the row.
    """
    if generation.oracle_forwards is None:
        return dict(counted)
    return {"prefill": counted["prefill"], "denoise": generation.oracle_forwards, "search": counted["search"]}
