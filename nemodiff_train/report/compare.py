"""Two finished evaluations side by side: figures over the prompts they share, and what became of each answer."""

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from nemodiff_train.errors import UserError
from nemodiff_train.evaluation.evaluation import Evaluation
from nemodiff_train.evaluation.metrics import ModeMetrics, summarise
from nemodiff_train.evaluation.records import LoggedRecord, read_records
from nemodiff_train.files import usable_directory, write_atomic
from nemodiff_train.report import charts
from nemodiff_train.report.page import render_page

Key = tuple[str, str | None, int]
"""A prompt, its answer, and which of several equal ones it is."""


class Change(BaseModel):
    """A prompt that one evaluation answers right and the other wrong."""

    model_config = ConfigDict(frozen=True)

    prompt_index: int = Field(description="Position of the prompt in A's task, from 0.")
    prompt: str
    answer: str
    text_a: str
    text_b: str


class ModeComparison(BaseModel):
    """One mode in both evaluations."""

    model_config = ConfigDict(frozen=True)

    a: ModeMetrics
    b: ModeMetrics
    lost: list[Change] = Field(description="Right in A, wrong in B.")
    gained: list[Change] = Field(description="Wrong in A, right in B.")
    p_value: float = Field(
        description="Exact two-sided McNemar test: how likely changes at least as lopsided are, were both ways "
        "equally likely."
    )


class Side(BaseModel):
    """Where one of the two evaluations comes from."""

    model_config = ConfigDict(frozen=True)

    directory: str
    checkpoint: str
    task: str
    created: str
    prompts_only_here: int = Field(description="Prompts that the other one lacks; they do not count.")
    modes_only_here: list[str]


class Comparison(BaseModel):
    """Everything the comparison shows. `compare` makes one."""

    a: Side
    b: Side
    prompts: int = Field(description="Prompts that both evaluations hold; all figures are over these.")
    modes: dict[str, ModeComparison]


def compare(first: Path, second: Path) -> Comparison:
    """Read two folders that ``write_report`` wrote.

    Figures are computed anew from the records of the prompts that both hold, so that they compare even where one
    evaluation has taken more prompts.

    Raises:
        UserError: A folder holds no evaluation, or the two share no prompt or no mode.
    """
    evaluations = read_evaluation(first), read_evaluation(second)
    modes = [mode for mode in evaluations[0].modes if mode in evaluations[1].modes]
    if not modes:
        raise UserError(f"{first} and {second} have no mode in common")
    rows_a, rows_b = ({mode: _headline(each, mode) for mode in modes} for each in evaluations)
    keys = [key for key in rows_a[modes[0]] if all(key in rows[mode] for rows in (rows_a, rows_b) for mode in modes)]
    if not keys:
        raise UserError(f"{first} and {second} have no prompt in common")
    return Comparison(
        a=_side(first, *evaluations, only=len(rows_a[modes[0]]) - len(keys)),
        b=_side(second, *evaluations[::-1], only=len(rows_b[modes[0]]) - len(keys)),
        prompts=len(keys),
        modes={mode: _compared([(rows_a[mode][key], rows_b[mode][key]) for key in keys]) for mode in modes},
    )


def read_evaluation(directory: Path) -> Evaluation:
    """What ``write_report`` wrote, without the samples.

    Raises:
        UserError: The folder holds no evaluation, or one of another version.
    """
    path = directory / "metrics.json"
    try:
        evaluation = Evaluation.model_validate_json(path.read_bytes())
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; it is no finished evaluation") from error
    except ValidationError as error:
        where = ".".join(map(str, error.errors()[0]["loc"]))
        raise UserError(f"{path} is no evaluation of this version: {where}: {error.errors()[0]['msg']}") from error
    return evaluation.model_copy(update={"records": read_records(directory / "records.jsonl")})


def write_comparison(directory: Path, comparison: Comparison) -> Path:
    """Write ``comparison.json`` and ``comparison.html``; each appears whole.

    Returns:
        The path of ``comparison.html``, which needs no other file.

    Raises:
        UserError: The directory cannot be made or written to.
    """
    usable_directory(directory)
    write_atomic(directory / "comparison.json", comparison.model_dump_json(indent=2) + "\n")
    drawing = charts.arrows(
        {mode: each.a for mode, each in comparison.modes.items()},
        {mode: each.b for mode, each in comparison.modes.items()},
    )
    return write_atomic(
        directory / "comparison.html", render_page("comparison", comparison=comparison, drawing=drawing)
    )


def mcnemar(lost: int, gained: int) -> float:
    """The exact two-sided test of ``lost`` changes one way and ``gained`` the other."""
    trials = lost + gained
    tail = sum(math.comb(trials, count) for count in range(min(lost, gained) + 1))
    return min(1.0, 2 * tail / 2**trials)


def _side(directory: Path, own: Evaluation, other: Evaluation, only: int) -> Side:
    return Side(
        directory=str(directory),
        checkpoint=own.checkpoint,
        task=own.task,
        created=own.created,
        prompts_only_here=only,
        modes_only_here=[mode for mode in own.modes if mode not in other.modes],
    )


def _headline(evaluation: Evaluation, mode: str) -> dict[Key, LoggedRecord]:
    """The records of a mode at its main settings, by prompt."""
    settings = evaluation.modes[mode].settings
    seen: Counter[tuple[str, str | None]] = Counter()
    rows = {}
    for record in evaluation.records:
        if record.mode == mode and record.settings == settings:
            prompt = record.prompt, record.answer
            rows[*prompt, seen[prompt]] = record
            seen[prompt] += 1
    return rows


def _compared(pairs: Sequence[tuple[LoggedRecord, LoggedRecord]]) -> ModeComparison:
    lost = [_change(a, b) for a, b in pairs if a.correct and not b.correct]
    gained = [_change(a, b) for a, b in pairs if b.correct and not a.correct]
    return ModeComparison(
        a=_figures([a for a, _ in pairs]),
        b=_figures([b for _, b in pairs]),
        lost=lost,
        gained=gained,
        p_value=mcnemar(len(lost), len(gained)),
    )


def _figures(rows: Sequence[LoggedRecord]) -> ModeMetrics:
    return summarise([row.decoded for row in rows], [row.correct for row in rows], rows[0].settings)


def _change(a: LoggedRecord, b: LoggedRecord) -> Change:
    return Change(
        prompt_index=a.decoded.prompt_index, prompt=a.prompt, answer=a.answer or "", text_a=a.text, text_b=b.text
    )
