"""Reduce runs to one `Evaluation`: every metric and the records."""

import platform
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from pydantic import BaseModel, ConfigDict, Field

from nemodiff_train import __version__
from nemodiff_train.evaluation.metrics import ModeMetrics, summarise
from nemodiff_train.evaluation.pareto import Areas, SweepPoint, areas
from nemodiff_train.evaluation.prompts import Task
from nemodiff_train.evaluation.records import DecodeRecord, LoggedRecord, Settings
from nemodiff_train.runtime.versions import installed


@dataclass(frozen=True)
class Run:
    """One mode with one set of decoding settings over all prompts of a task."""

    mode: str
    settings: Settings
    decoded: list[DecodeRecord]


class CategoryMetrics(BaseModel):
    """Metrics of one mode over the prompts of one category; the rules are those of `ModeMetrics`."""

    model_config = ConfigDict(frozen=True)

    category: str
    mode: str
    prompts: int
    accuracy: float | None
    tpf_all: float
    acceptance_length: float | None = Field(description="None in modes without cycles.")


def _versions() -> dict[str, str]:
    packages = {name: installed(name) for name in ("megatron-bridge", "megatron-core", "torch", "transformers")}
    versions = {"nemodiff-train": __version__, "python": platform.python_version()}
    return versions | {name: version for name, version in packages.items() if version}


class Evaluation(BaseModel):
    """Everything the report shows. `assemble` makes one."""

    checkpoint: str = Field(description="Name or path of the checkpoint.")
    task: str = Field(description="Name of the task.")
    settings: Settings = Field(description="Settings common to all runs, such as seed, dtype and device.")
    modes: dict[str, ModeMetrics] = Field(description="Figures by mode, each at the settings that were asked for.")
    sweep: list[SweepPoint] = Field(
        default=[], description="Runs of the modes with several settings, by mode, block size and threshold."
    )
    areas: Areas = Field(description="Accuracy under parallelism of each mode's curves.")
    categories: list[CategoryMetrics] = Field(default=[], description="Figures by category of the prompts.")
    records: list[LoggedRecord] = Field(default=[], exclude=True, description="Goes to records.jsonl.")
    versions: dict[str, str] = Field(default_factory=_versions)
    created: str = Field(
        default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"), description="UTC, ISO 8601."
    )

    @property
    def points(self) -> list[SweepPoint]:
        """Return every mode at every setting, each once."""
        return all_points(self.modes, self.sweep)


def all_points(modes: Mapping[str, ModeMetrics], sweep: Sequence[SweepPoint]) -> list[SweepPoint]:
    """Return the modes that are not in the sweep, then the sweep."""
    swept = {point.mode for point in sweep}
    return [SweepPoint(mode=mode, metrics=metrics) for mode, metrics in modes.items() if mode not in swept] + [*sweep]


def assemble(
    checkpoint: str,
    task: Task,
    runs: Sequence[Run],
    detokenize: Callable[[list[int]], str],
    *,
    settings: Settings,
    sweep: Sequence[Run] = (),
) -> Evaluation:
    """Score and reduce all runs.

    Args:
        checkpoint: Name shown in the report.
        task: Prompts and scorer; ``prompt_index`` of each record points into it.
        runs: One per mode, the headline of each. A run of mode ``ar`` is the reference of the others.
        detokenize: Turns tokens into text.
        settings: What all runs share.
        sweep: All runs of the modes with several settings; holds the same objects as ``runs``, logged once.
    """
    logs: dict[int, list[LoggedRecord]] = {}
    for run in (*runs, *sweep):
        if id(run) not in logs:
            logs[id(run)] = _log(run, task, detokenize)
    ar = next((run.decoded for run in runs if run.mode == "ar"), None)

    def reduce(run: Run) -> ModeMetrics:
        return summarise(run.decoded, [row.correct for row in logs[id(run)]], run.settings, ar)

    modes = {run.mode: reduce(run) for run in runs}
    points = [SweepPoint(mode=run.mode, metrics=reduce(run)) for run in sweep]
    return Evaluation(
        checkpoint=checkpoint,
        task=task.name,
        settings=settings,
        modes=modes,
        sweep=points,
        areas=areas(all_points(modes, points)),
        categories=by_category([row for run in runs for row in logs[id(run)]]),
        records=[row for rows in logs.values() for row in rows],
    )


def by_category(records: Sequence[LoggedRecord]) -> list[CategoryMetrics]:
    """Reduce the records of each mode by category, both in order of occurrence; prompts without one are left out."""
    groups: dict[str, dict[str, list[LoggedRecord]]] = defaultdict(lambda: defaultdict(list))
    for record in records:
        if record.category is not None:
            groups[record.category][record.mode].append(record)
    reduced = []
    for category, modes in groups.items():
        for mode, rows in modes.items():
            metrics = summarise([row.decoded for row in rows], [row.correct for row in rows], rows[0].settings)
            figures = metrics.model_dump(include={"prompts", "accuracy", "tpf_all", "acceptance_length"})
            reduced.append(CategoryMetrics(category=category, mode=mode, **figures))
    return reduced


def _log(run: Run, task: Task, detokenize: Callable[[list[int]], str]) -> list[LoggedRecord]:
    """Score every record of a run."""
    rows = []
    for record in run.decoded:
        text, prompt = detokenize(record.tokens), task.prompts[record.prompt_index]
        rows.append(
            LoggedRecord(
                mode=run.mode,
                settings=run.settings,
                prompt=prompt.prompt,
                answer=prompt.answer,
                category=prompt.category,
                text=text,
                correct=task.score(record.prompt_index, text),
                decoded=record,
            )
        )
    return rows
