"""Writes the evaluation: figures for machines, a page for people."""

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup
from pydantic import JsonValue

from nemodiff_train.evaluation.evaluation import Evaluation
from nemodiff_train.evaluation.metrics import ModeMetrics, PositionAgreement
from nemodiff_train.evaluation.pareto import Area, varied_settings
from nemodiff_train.evaluation.records import KINDS, write_records
from nemodiff_train.files import usable_directory, write_atomic
from nemodiff_train.report import charts, display
from nemodiff_train.report.page import inline_json, render_page
from nemodiff_train.report.trace import Trace

_SWEPT = ("block_size", "threshold")
_SCALARS = (
    "prompts", "accuracy", "accuracy_low", "accuracy_high", "tokens", "tpf_all", "tpf_no_prefill",
    "acceptance_length", "seconds", "tokens_per_second", "forwards_per_second", "identical_to_ar",
)  # fmt: skip


def write_report(directory: Path, evaluation: Evaluation) -> Path:
    """Write ``records.jsonl``, ``metrics.json``, ``metrics.csv`` and ``report.html``; each appears whole.

    Returns:
        The path of ``report.html``, which needs no other file.

    Raises:
        UserError: The directory cannot be made or written to.
    """
    usable_directory(directory)
    write_records(directory / "records.jsonl", evaluation.records)
    write_atomic(directory / "metrics.json", metrics_json(evaluation))
    write_atomic(directory / "metrics.csv", metrics_csv(evaluation))
    return write_atomic(directory / "report.html", render(evaluation))


def rules() -> dict[str, str]:
    """Every figure's counting rule in words, by field name."""
    fields = {**ModeMetrics.model_fields, **PositionAgreement.model_fields, "aup": Area.model_fields["aup"]}
    return {name: field.description or "" for name, field in fields.items()}


def metrics_json(evaluation: Evaluation) -> str:
    """All figures, settings and versions, with ``rules`` beside them."""
    return json.dumps({**evaluation.model_dump(mode="json"), "rules": rules()}, indent=2, ensure_ascii=False) + "\n"


def metrics_csv(evaluation: Evaluation) -> str:
    """One row a run: the modes, then the sweep. An empty cell: not applicable."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["run", "mode", *_SWEPT, *_SCALARS, *(f"forwards_{kind}" for kind in KINDS)])
    for mode, metrics in evaluation.modes.items():
        writer.writerow(["mode", mode, *_cells(metrics)])
    for point in evaluation.sweep:
        writer.writerow(["sweep", point.mode, *_cells(point.metrics)])
    return out.getvalue()


def _cells(metrics: ModeMetrics) -> list[object]:
    return [
        *(metrics.settings.get(name, "") for name in _SWEPT),
        *(getattr(metrics, name) for name in _SCALARS),
        *(metrics.forwards.get(kind, 0) for kind in KINDS),
    ]


def render(evaluation: Evaluation) -> str:
    """The page. All text from outside is escaped; it loads nothing."""
    return render_page(
        "report",
        evaluation=evaluation,
        prompts=max(metrics.prompts for metrics in evaluation.modes.values()),
        speedups=_speedups(evaluation),
        columns=display.COLUMNS,
        pictures=_pictures(evaluation),
        rules=rules(),
        traces=inline_json([[_replay(output.trace) for output in each.outputs] for each in evaluation.samples]),
        shown_first=_shown_first(evaluation.modes),
    )


def _replay(trace: Trace) -> JsonValue:
    """What the script needs of a trace: the text itself it finds on the page."""
    return {
        "steps": [piece.step for piece in trace.pieces],
        "positions": [piece.position for piece in trace.pieces],
        "drafts": [draft.model_dump() for draft in trace.drafts],
        "frames": [frame.model_dump() for frame in trace.frames],
    }


def _shown_first(modes: dict[str, ModeMetrics]) -> str:
    """The mode that the viewer opens with: one that drafts, where there is one."""
    return next((mode for mode, metrics in modes.items() if metrics.agreement), list(modes)[-1])


def _speedups(evaluation: Evaluation) -> dict[str, float]:
    """Tokens a second over the ar run's, by mode; empty without an ar run or without times."""
    ar = evaluation.modes.get("ar")
    if ar is None or not ar.tokens_per_second:
        return {}
    rates = {mode: metrics.tokens_per_second for mode, metrics in evaluation.modes.items() if mode != "ar"}
    return {mode: rate / ar.tokens_per_second for mode, rate in rates.items() if rate}


@dataclass(frozen=True)
class Picture:
    """One drawing of the page."""

    heading: str
    caption: str
    drawing: Markup
    modes: Sequence[str] = ()
    """Modes to be named by colour below the caption."""


def _pictures(evaluation: Evaluation) -> list[Picture]:
    """Each picture that there is data for."""
    return [
        Picture(
            "Tokens per forward",
            "New tokens for each call of the model, all calls counted. The pale tip leaves out the prefill.",
            charts.tpf_bars(evaluation.modes),
        ),
        Picture(
            "Where the forwards go",
            "Calls of the model for 100 new tokens, by what the call was for.",
            charts.forwards_bars(evaluation.modes),
        ),
        *_speed_picture(evaluation),
        *_category_picture(evaluation),
        *(_agreement_picture(mode, m) for mode, m in evaluation.modes.items() if m.agreement),
    ]


def _speed_picture(evaluation: Evaluation) -> list[Picture]:
    points = evaluation.points
    if len(points) < 2 or any(point.metrics.accuracy is None for point in points):
        return []
    caption = "The grey line is the front: the settings that no other beats. Hollow points are beaten."
    varied = dict.fromkeys(name for mode in evaluation.modes for name in _varied(evaluation, mode))
    if varied:
        caption += f" Numbers: {' \N{MULTIPLICATION SIGN} '.join(name.replace('_', ' ') for name in varied)}."
    return [Picture("Accuracy against speed", caption, charts.speed_curves(points), list(evaluation.modes))]


def _varied(evaluation: Evaluation, mode: str) -> list[str]:
    return varied_settings([point for point in evaluation.sweep if point.mode == mode])


def _category_picture(evaluation: Evaluation) -> list[Picture]:
    if not evaluation.categories:
        return []
    caption = "Each mode at its main settings, over the prompts of one category."
    modes = list(dict.fromkeys(row.mode for row in evaluation.categories))
    return [Picture("Speed by category", caption, charts.category_dots(evaluation.categories), modes)]


def _agreement_picture(mode: str, metrics: ModeMetrics) -> Picture:
    caption = (
        f"{display.title(mode)}: how often the verifier agrees with the drafted token, in the cycles that reach "
        "the position and in every cycle. Shaded: share of cycles that reach it. Hollow: fewer than "
        f"{charts.FEW} cycles. A cycle commits {display.decimal(metrics.acceptance_length)} tokens on average."
    )
    return Picture("Agreement by position in the block", caption, charts.agreement_curve(mode, metrics.agreement))
