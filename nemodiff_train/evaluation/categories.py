"""Metrics by the category of the prompts, where a task names categories."""

from collections import defaultdict
from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict, Field

from nemodiff_train.evaluation.metrics import summarise
from nemodiff_train.evaluation.records import LoggedRecord


class CategoryMetrics(BaseModel):
    """Metrics of one mode over the prompts of one category; the rules are those of `ModeMetrics`."""

    model_config = ConfigDict(frozen=True)

    category: str
    mode: str
    prompts: int
    accuracy: float | None
    tpf_all: float
    acceptance_length: float | None = Field(description="None in modes without cycles.")


def by_category(records: Sequence[LoggedRecord]) -> list[CategoryMetrics]:
    """Reduce the records of each mode by category, both in order of occurrence; prompts without one are left out."""
    groups: dict[str, dict[str, list[LoggedRecord]]] = defaultdict(lambda: defaultdict(list))
    for record in records:
        if record.category is not None:
            groups[record.category][record.mode].append(record)
    return [_reduce(category, mode, rows) for category, modes in groups.items() for mode, rows in modes.items()]


def _reduce(category: str, mode: str, rows: list[LoggedRecord]) -> CategoryMetrics:
    metrics = summarise([row.decoded for row in rows], [row.correct for row in rows], rows[0].settings)
    return CategoryMetrics(
        category=category,
        mode=mode,
        prompts=metrics.prompts,
        accuracy=metrics.accuracy,
        tpf_all=metrics.tpf_all,
        acceptance_length=metrics.acceptance_length,
    )
