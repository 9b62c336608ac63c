"""Replay of one output: which forward committed which token, and what each cycle drafted."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

from nemodiff_train.evaluation.records import DecodeRecord

Detokenize = Callable[[list[int]], str]
"""Turns tokens into text, special tokens left out."""

CONTEXT = 8
"""Tokens before a draft that are decoded with it, so that its first character and its spaces come out right."""


@dataclass(frozen=True)
class Piece:
    """A stretch of output text: one token, or the few tokens that make up one character."""

    text: str
    position: int
    """Index of its first token in the output."""
    step: int
    """Number, from 0, of the forward that determined it among those that determined any."""


@dataclass(frozen=True)
class Draft:
    """The draft of one cycle."""

    start: int
    """Index in the output of the first token that the cycle may commit."""
    texts: list[str]
    """Draft tokens as text; empty at special tokens and inside a character of several tokens."""
    accept_mask: list[bool]
    """Whether each draft token passed the verifier's test."""
    accepted: int
    """Number of draft tokens that were committed."""


@dataclass(frozen=True)
class Frame:
    """One stop of the replay's slider."""

    words: str
    """Description of what happens in the frame."""
    step: int
    """Pieces of this step and of earlier ones are committed."""
    draft: int | None = None
    """Index of the draft that is shown."""
    verified: bool = False
    """Whether the draft has been verified."""


@dataclass(frozen=True)
class Trace:
    """The text of an output cut into pieces, and the frames of its replay."""

    pieces: list[Piece]
    drafts: list[Draft]
    frames: list[Frame]

    @property
    def last(self) -> int:
        """The last step, at least 1; colours are spread over 0..last."""
        return max((frame.step for frame in self.frames), default=0) or 1


def trace(record: DecodeRecord, detokenize: Detokenize) -> Trace:
    """Return all that the replay needs of a record.

    Its text is cut at token borders; a character made of several tokens stays whole.
    """
    steps = sorted(set(record.steps))
    rank_of_step = {step: rank for rank, step in enumerate(steps)}
    ranks = [rank_of_step[step] for step in record.steps]
    pieces = [Piece(text, first, ranks[last]) for text, first, last in _cut(record.tokens, detokenize)]
    drafts = _drafts(record, detokenize)
    return Trace(pieces, drafts, _frames(record, steps, ranks, drafts))


def _cut(tokens: Sequence[int], detokenize: Detokenize) -> list[tuple[str, int, int]]:
    """Return the text between whole characters, with the indices of its first and last token."""
    stretches: list[tuple[str, int, int]] = []
    before, first = "", 0
    for last in range(len(tokens)):
        text = detokenize(list(tokens[: last + 1]))
        if text.endswith("\N{REPLACEMENT CHARACTER}") and last + 1 < len(tokens):
            continue  # in the middle of a character
        if len(text) > len(before):
            stretches.append((text[len(before) :], first, last))
        before, first = text, last + 1
    return stretches


def _drafts(record: DecodeRecord, detokenize: Detokenize) -> list[Draft]:
    """Return the draft of each cycle that has one."""
    drafts = []
    committed = [cycle.committed for cycle in record.cycles]
    cycle_starts = accumulate(committed, initial=len(record.tokens) - sum(committed))
    for cycle_start, cycle in zip(cycle_starts, record.cycles, strict=False):
        if not cycle.draft_tokens:
            continue
        start = cycle_start + cycle.target_tokens
        context = record.tokens[max(start - CONTEXT, 0) : start]
        texts = [""] * len(cycle.draft_tokens)
        for text, first, _ in _cut([*context, *cycle.draft_tokens], detokenize):
            if first >= len(context):
                texts[first - len(context)] = text
        drafts.append(Draft(start, texts, cycle.accept_mask, cycle.accepted))
    return drafts


def _frames(record: DecodeRecord, steps: Sequence[int], ranks: Sequence[int], drafts: Sequence[Draft]) -> list[Frame]:
    """Return one frame per step, or two where its tokens were drafted and verified."""
    frames = []
    draft_of_rank = {ranks[draft.start]: index for index, draft in enumerate(drafts) if draft.start < len(ranks)}
    for rank, step in enumerate(steps):
        done = f"{sum(other <= rank for other in ranks)} of {len(ranks)} tokens"
        index = draft_of_rank.get(rank)
        if index is None:
            name = f"Forward {step} of {sum(record.forwards.values())}"
            frames.append(Frame(f"{name} \N{MIDDLE DOT} {done}", rank))
            continue
        draft, cycle = drafts[index], f"Cycle {index + 1} of {len(drafts)}"
        verified = f"{cycle} accepts {draft.accepted} of {len(draft.texts)} \N{MIDDLE DOT} {done}"
        frames.append(Frame(f"{cycle} drafts {len(draft.texts)}", rank - 1, index))
        frames.append(Frame(verified, rank, index, verified=True))
    return frames
