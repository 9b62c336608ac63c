"""Records of decoding: one per prompt, and the log of all of them."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import get_args

from pydantic import BaseModel, ConfigDict, JsonValue

from nemodiff_train.decoding.generation import Cycle, ForwardKind
from nemodiff_train.errors import UserError
from nemodiff_train.files import write_atomic
from nemodiff_train.schema import checked

Settings = dict[str, JsonValue]


@dataclass(frozen=True)
class DecodeRecord:
    """One prompt's continuation and every forward it took.

    Raises:
        ValueError: The fields contradict each other.
    """

    prompt_index: int
    """Index of the prompt in the task."""
    tokens: list[int]
    """The new tokens, the stop token included if it was produced."""
    forwards: dict[str, int]
    """Calls of the model by :data:`~nemodiff_train.decoding.generation.ForwardKind`. In a batch, a call counts once
    for each row that was still decoding, so the sum does not depend on the batch size."""
    cycles: list[Cycle] = field(default_factory=list)
    """Draft + verify cycles; empty in modes that have none. The token that the prefill yields belongs to no cycle.
    An oracle's cycles have no draft tokens."""
    seconds: float = 0.0
    """Wall-clock seconds. In a batch, the batch's seconds divided by its rows, so that the sum over prompts is the
    time that passed."""
    steps: list[int] = field(kw_only=True)
    """For each token, which of the row's forwards, counted from 1, determined it."""
    seconds_by_kind: dict[str, float] = field(default_factory=dict)
    """Part of ``seconds`` that was spent in the model, by kind of forward."""

    def __post_init__(self) -> None:
        known = get_args(ForwardKind)
        if unknown := set(self.forwards) - set(known):
            raise ValueError(f"unknown kinds of forward {sorted(unknown)}; known: {', '.join(known)}")
        if not self.tokens or sum(self.forwards.values()) < 1:
            raise ValueError("a decoded prompt has at least one token and took at least one forward")
        committed = sum(cycle.committed for cycle in self.cycles)
        if committed > len(self.tokens):
            raise ValueError(f"cycles committed {committed} tokens, but there are {len(self.tokens)}")
        if len(self.steps) != len(self.tokens):
            raise ValueError(f"{len(self.steps)} steps for {len(self.tokens)} tokens")


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


def read_jsonl[Row: BaseModel](path: Path, model: type[Row]) -> list[Row]:
    """Validate each line of a JSONL file as ``model``; blank lines are passed over.

    Raises:
        UserError: The file cannot be read, is not UTF-8, holds no line, or a line does not fit the model.
    """
    try:
        lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").splitlines()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; name another file") from error
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            line.decode()
        except UnicodeDecodeError as error:
            raise UserError(
                f"{path}:{number}: not UTF-8 at byte {error.start + 1} of the line; correct the line"
            ) from error
        rows.append(checked(model, line, f"{path}:{number}", "correct or remove the line"))
    if not rows:
        raise UserError(f"{path} is empty: expected one JSON object per line")
    return rows
