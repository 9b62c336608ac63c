"""Replay of one output: which forward committed which token, and what each cycle drafted."""

from collections.abc import Callable, Sequence
from itertools import accumulate

from pydantic import BaseModel, ConfigDict, Field

from nemodiff_train.decoding.generation import Cycle
from nemodiff_train.evaluation.records import DecodeRecord

Decode = Callable[[list[int]], str]
"""Turns tokens into text, special tokens left out."""

CONTEXT = 8
"""Tokens before a draft that are decoded with it, so that its first character and its spaces come out right."""


class Piece(BaseModel):
    """A stretch of output text: one token, or the few tokens that make up one character."""

    model_config = ConfigDict(frozen=True)

    text: str
    position: int = Field(description="Index of its first token in the output.")
    step: int = Field(
        description="Number, from 0, of the forward that determined it among those that determined any."
    )


class Draft(BaseModel):
    """The draft of one cycle."""

    model_config = ConfigDict(frozen=True)

    start: int = Field(description="Index in the output of the first token that the cycle may commit.")
    texts: list[str] = Field(description="Draft tokens as text.")
    accept_mask: list[bool] = Field(description="Whether each draft token passed the verifier's test.")
    accepted: int = Field(description="Number of draft tokens that were committed.")


class Frame(BaseModel):
    """One stop of the replay's slider."""

    model_config = ConfigDict(frozen=True)

    words: str = Field(description="What happens in it.")
    step: int = Field(description="Pieces of this step and of earlier ones are committed.")
    draft: int | None = Field(default=None, description="Index of the draft that is shown.")
    verified: bool = Field(default=False, description="Whether the draft has been verified.")


class Trace(BaseModel):
    """The text of an output cut into pieces, and the frames of its replay."""

    model_config = ConfigDict(frozen=True)

    pieces: list[Piece]
    drafts: list[Draft]
    frames: list[Frame]

    @property
    def last(self) -> int:
        """The last step, at least 1; colours are spread over 0..last."""
        return max((frame.step for frame in self.frames), default=0) or 1


def trace(record: DecodeRecord, decode: Decode) -> Trace:
    """Return all that the replay needs of a record."""
    drafts = _drafts(record, decode)
    return Trace(pieces=pieces(record, decode), drafts=drafts, frames=_frames(record, drafts))


def pieces(record: DecodeRecord, decode: Decode) -> list[Piece]:
    """Cut a record's text at token borders; a character made of several tokens stays whole."""
    steps = _step_ranks(record)
    return [Piece(text=text, position=first, step=steps[last]) for text, first, last in _cut(record.tokens, decode)]


def _cut(tokens: Sequence[int], decode: Decode) -> list[tuple[str, int, int]]:
    """Return the text between whole characters, with the indices of its first and last token."""
    stretches: list[tuple[str, int, int]] = []
    before, first = "", 0
    for last in range(len(tokens)):
        text = decode(list(tokens[: last + 1]))
        if text.endswith("\N{REPLACEMENT CHARACTER}") and last + 1 < len(tokens):
            continue  # in the middle of a character
        if len(text) > len(before):
            stretches.append((text[len(before) :], first, last))
        before, first = text, last + 1
    return stretches


def _step_ranks(record: DecodeRecord) -> list[int]:
    """Return for each token the rank of its step among all steps that committed a token."""
    ranks = {step: rank for rank, step in enumerate(sorted(set(record.steps)))}
    return [ranks[step] for step in record.steps]


def _drafts(record: DecodeRecord, decode: Decode) -> list[Draft]:
    if not any(cycle.draft_tokens for cycle in record.cycles):
        return []
    committed = [cycle.committed for cycle in record.cycles]
    starts = accumulate(committed, initial=len(record.tokens) - sum(committed))
    cycles = zip(starts, record.cycles, strict=False)
    return [_draft(record, decode, start + cycle.sure, cycle) for start, cycle in cycles if cycle.draft_tokens]


def _draft(record: DecodeRecord, decode: Decode, start: int, cycle: Cycle) -> Draft:
    before = record.tokens[max(start - CONTEXT, 0) : start]
    texts = [""] * len(cycle.draft_tokens)  # stays empty at special tokens and inside a character of several tokens
    for text, first, _ in _cut([*before, *cycle.draft_tokens], decode):
        if first >= len(before):
            texts[first - len(before)] = text
    return Draft(start=start, texts=texts, accept_mask=cycle.accept_mask, accepted=cycle.accepted)


def _frames(record: DecodeRecord, drafts: Sequence[Draft]) -> list[Frame]:
    ranks = _step_ranks(record)
    cycles = {ranks[draft.start]: index for index, draft in enumerate(drafts) if draft.start < len(ranks)}
    frames = []
    for rank, step in enumerate(sorted(set(record.steps))):
        done = f"{sum(other <= rank for other in ranks)} of {len(ranks)} tokens"
        index = cycles.get(rank)
        if index is None:
            name = f"Forward {step} of {sum(record.forwards.values())}"
            frames.append(Frame(words=f"{name} \N{MIDDLE DOT} {done}", step=rank))
            continue
        draft, cycle = drafts[index], f"Cycle {index + 1} of {len(drafts)}"
        drafted = f"{cycle} drafts {len(draft.texts)}"
        verified = f"{cycle} accepts {draft.accepted} of {len(draft.texts)} \N{MIDDLE DOT} {done}"
        frames += [
            Frame(words=drafted, step=rank - 1, draft=index),
            Frame(words=verified, step=rank, draft=index, verified=True),
        ]
    return frames
