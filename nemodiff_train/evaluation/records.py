"""What decoding one prompt leaves behind, and the raw log of it."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import BaseModel, ConfigDict, JsonValue, ValidationError

from nemodiff_train.decoding.generation import Cycle
from nemodiff_train.errors import UserError
from nemodiff_train.files import write_atomic

# prefill: the prompt, once. decode: one autoregressive step. draft, verify: self-speculation.
# denoise: one pass over a masked block. commit: the causal pass that writes a finished block to the cache.
# fused: verification and the next draft in one. search: what an oracle spent to find its path; never part of TPF.
KINDS = ("prefill", "decode", "draft", "verify", "denoise", "commit", "fused", "search")

Settings = dict[str, JsonValue]


@dataclass(frozen=True)
class DecodeRecord:
    """One prompt's continuation and every forward it took.

    Attributes:
        prompt_index: Position of the prompt in the task, from 0.
        tokens: The new tokens, the stop token included if it was produced.
        forwards: Calls of the model by kind (``KINDS``). In a batch, a call counts once for each row
            that was still decoding, so the sum does not depend on the batch size.
        cycles: Draft + verify cycles; empty in the modes that have none. The token that the prefill yields
            belongs to no cycle. An oracle's have no drafts.
        seconds_by_kind: Seconds of ``seconds`` that were spent in the model, by kind of forward.
        seconds: Wall-clock seconds. In a batch, the batch's seconds divided by its rows, so that the
            sum over prompts is the time that passed.
        steps: For each token, the number of the cycle or forward that committed it (any numbers that
            grow with time). May be left empty where ``cycles`` or plain AR decoding implies it.
    """

    prompt_index: int
    tokens: list[int]
    forwards: dict[str, int]
    cycles: list[Cycle] = field(default_factory=list)
    seconds: float = 0.0
    steps: list[int] = field(default_factory=list)
    seconds_by_kind: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        unknown = set(self.forwards) - set(KINDS)
        if unknown:
            raise ValueError(f"unknown kinds of forward {sorted(unknown)}; known: {', '.join(KINDS)}")
        if not self.tokens or sum(self.forwards.values()) < 1:
            raise ValueError("a decoded prompt has at least one token and took at least one forward")
        committed = sum(cycle.committed for cycle in self.cycles)
        if committed > len(self.tokens):
            raise ValueError(f"cycles committed {committed} tokens, but there are {len(self.tokens)}")
        if self.steps and len(self.steps) != len(self.tokens):
            raise ValueError(f"{len(self.steps)} steps for {len(self.tokens)} tokens")

    def commit_steps(self) -> list[int]:
        """For each token, the cycle or forward that committed it; empty if the record does not tell."""
        if self.steps:
            return self.steps
        if self.cycles:
            committed = [cycle.committed for cycle in self.cycles]
            counts = [len(self.tokens) - sum(committed), *committed]
            return [cycle for cycle, count in enumerate(counts) for _ in range(count)]
        if set(self.forwards) <= {"prefill", "decode"}:
            return list(range(len(self.tokens)))
        return []


class LoggedRecord(BaseModel):
    """One line of ``records.jsonl``: all that is needed to recompute every figure of the report."""

    model_config = ConfigDict(frozen=True)

    mode: str
    settings: Settings
    prompt: str
    answer: str | None
    text: str
    correct: bool | None
    """None where the prompt has no answer."""
    category: str | None = None
    """The prompt's category, where the task names one."""
    decoded: DecodeRecord


def write_records(path: Path, records: Iterable[LoggedRecord]) -> Path:
    """Write one JSON object per line, atomically."""
    return write_atomic(path, "".join(record.model_dump_json() + "\n" for record in records))


def read_records(path: Path) -> list[LoggedRecord]:
    """Read what ``write_records`` wrote.

    Raises:
        UserError: The file cannot be read, or a line is not a record; names ``file:line``.
    """
    return read_jsonl(path, LoggedRecord)


def read_jsonl[Row: BaseModel](path: Path, model: type[Row]) -> list[Row]:
    """Validate each line of a JSONL file as ``model``; blank lines are passed over.

    Raises:
        UserError: The file cannot be read, is not UTF-8, holds no line, or a line does not fit the model.
    """
    try:
        lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").splitlines()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    rows = [_row(f"{path}:{number}", line, model) for number, line in enumerate(lines, 1) if line.strip()]
    if not rows:
        raise UserError(f"{path} is empty: expected one JSON object per line")
    return rows


def _row[Row: BaseModel](place: str, line: bytes, model: type[Row]) -> Row:
    try:
        return model.model_validate_json(line.decode())
    except UnicodeDecodeError as error:
        raise UserError(f"{place}: not UTF-8 at byte {error.start + 1} of the line") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise UserError(f"{place}: {where + ': ' if where else ''}{first['msg']}") from error
