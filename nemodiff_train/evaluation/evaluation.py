"""From runs to one `Evaluation`: every figure, the raw records and a few outputs to read."""

import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata

from pydantic import BaseModel, ConfigDict, Field

from nemodiff_train import __version__
from nemodiff_train.evaluation.metrics import ModeMetrics, summarise
from nemodiff_train.evaluation.records import Decoded, LoggedRecord, Settings
from nemodiff_train.evaluation.tasks import Task

Decode = Callable[[list[int]], str]
"""Tokens to text, special tokens left out."""


@dataclass(frozen=True)
class Run:
    """One mode with one set of decoding settings over all prompts of a task."""

    mode: str
    settings: Settings
    decoded: list[Decoded]


class Piece(BaseModel):
    """A stretch of output text and the cycle or forward that committed it (none if not known)."""

    model_config = ConfigDict(frozen=True)

    text: str
    step: int | None


class Output(BaseModel):
    """What one mode made of a sample prompt."""

    model_config = ConfigDict(frozen=True)

    mode: str
    pieces: list[Piece]
    correct: bool
    tokens: int
    forwards: int


class Sample(BaseModel):
    """One prompt with every mode's output."""

    model_config = ConfigDict(frozen=True)

    prompt: str
    answer: str
    outputs: list[Output]


def _versions() -> dict[str, str]:
    versions = {"nemodiff-train": __version__, "python": platform.python_version()}
    for package in ("megatron-bridge", "megatron-core", "torch", "transformers"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions


class Evaluation(BaseModel):
    """Everything the report shows. `assemble` makes one."""

    checkpoint: str = Field(description="Name or path of the checkpoint.")
    task: str = Field(description="Name of the task.")
    settings: Settings = Field(description="Settings common to all runs, such as seed, dtype and device.")
    modes: dict[str, ModeMetrics] = Field(description="Figures by mode: ar, diffusion, linear.")
    sweep: list[tuple[float, ModeMetrics]] = Field(
        default=[], description="Diffusion runs by confidence threshold, ascending."
    )
    samples: list[Sample] = Field(default=[], description="A few prompts with their outputs.")
    records: list[LoggedRecord] = Field(default=[], exclude=True, description="Goes to records.jsonl.")
    versions: dict[str, str] = Field(default_factory=_versions)
    created: str = Field(
        default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"), description="UTC, ISO 8601."
    )


def assemble(
    checkpoint: str,
    task: Task,
    runs: Sequence[Run],
    decode: Decode,
    *,
    settings: Settings,
    sweep: Mapping[float, Run] | None = None,
    samples: int = 3,
) -> Evaluation:
    """Score and reduce all runs.

    Args:
        checkpoint: Name shown in the report.
        task: Prompts and scorer; ``prompt_index`` of each record points into it.
        runs: One per mode, the headline of each. A run of mode ``ar`` is the reference of the others.
        decode: Tokens to text.
        settings: What all runs share.
        sweep: Diffusion runs by threshold; may hold the same object as ``runs``, which is logged once.
        samples: Prompts whose outputs the report shows, from the first.
    """
    sweep = dict(sorted((sweep or {}).items()))
    logs: dict[int, list[LoggedRecord]] = {}
    for run in (*runs, *sweep.values()):
        logs.setdefault(id(run), _log(run, task, decode))
    ar = next((run.decoded for run in runs if run.mode == "ar"), None)

    def reduce(run: Run) -> ModeMetrics:
        return summarise(run.decoded, [row.correct for row in logs[id(run)]], run.settings, ar)

    return Evaluation(
        checkpoint=checkpoint,
        task=task.name,
        settings=settings,
        modes={run.mode: reduce(run) for run in runs},
        sweep=[(threshold, reduce(run)) for threshold, run in sweep.items()],
        samples=[_sample(index, task, runs, logs, decode) for index in range(min(samples, len(task.prompts)))],
        records=[row for rows in logs.values() for row in rows],
    )


def pieces(record: Decoded, decode: Decode) -> list[Piece]:
    """Cut a record's text at token borders; a character made of several tokens stays whole."""
    steps = record.commit_steps()
    if not steps:
        return [Piece(text=decode(record.tokens), step=None)]
    found: list[Piece] = []
    shown = ""
    for end, step in enumerate(steps, 1):
        text = decode(record.tokens[:end])
        if text.endswith("\N{REPLACEMENT CHARACTER}") and end < len(steps):
            continue
        if len(text) > len(shown):
            found.append(Piece(text=text[len(shown) :], step=step))
        shown = text
    return found


def _log(run: Run, task: Task, decode: Decode) -> list[LoggedRecord]:
    rows = []
    for record in run.decoded:
        text, prompt = decode(record.tokens), task.prompts[record.prompt_index]
        rows.append(
            LoggedRecord(
                mode=run.mode,
                settings=run.settings,
                prompt=prompt.prompt,
                answer=prompt.answer,
                text=text,
                correct=task.score(record.prompt_index, text),
                decoded=record,
            )
        )
    return rows


def _sample(
    index: int, task: Task, runs: Sequence[Run], logs: Mapping[int, list[LoggedRecord]], decode: Decode
) -> Sample:
    outputs = [
        Output(
            mode=run.mode,
            pieces=pieces(row.decoded, decode),
            correct=row.correct,
            tokens=len(row.decoded.tokens),
            forwards=sum(row.decoded.forwards.values()),
        )
        for run in runs
        for row in logs[id(run)]
        if row.decoded.prompt_index == index
    ]
    return Sample(prompt=task.prompts[index].prompt, answer=task.prompts[index].answer, outputs=outputs)
