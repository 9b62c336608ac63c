"""Write an evaluation: its figures and records as JSON, and a page to look at."""

import base64
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from pydantic import JsonValue

from nemodiff_train.evaluation.evaluation import Evaluation
from nemodiff_train.evaluation.metrics import ModeMetrics, PositionAgreement
from nemodiff_train.evaluation.pareto import Area, varied_settings
from nemodiff_train.evaluation.records import LoggedRecord, write_records
from nemodiff_train.files import usable_directory, write_atomic
from nemodiff_train.report import charts, display
from nemodiff_train.report.trace import Decode, Trace, trace
from nemodiff_train.shown import visible

SAMPLES = 6
"""Maximum number of prompts whose outputs are replayed, from the first."""


@dataclass(frozen=True)
class Output:
    """One mode's output for a sample prompt."""

    record: LoggedRecord
    trace: Trace


@dataclass(frozen=True)
class Sample:
    """One prompt with every mode's output at its main settings."""

    prompt: str
    answer: str | None
    outputs: list[Output]


@dataclass(frozen=True)
class Chart:
    """One drawing of the page."""

    heading: str
    caption: str
    drawing: Markup
    modes: Sequence[str] = ()
    """Modes to name by colour below the caption."""


def write_report(directory: Path, evaluation: Evaluation, decode: Decode) -> Path:
    """Write ``records.jsonl``, ``metrics.json`` and ``report.html``, each atomically.

    Args:
        directory: Created if it does not exist.
        evaluation: The figures and the records.
        decode: Turns tokens into text, for the replay.

    Returns:
        The path of ``report.html``, which needs no other file.

    Raises:
        UserError: The directory cannot be created or written to.
    """
    usable_directory(directory)
    write_records(directory / "records.jsonl", evaluation.records)
    write_atomic(directory / "metrics.json", metrics_json(evaluation))
    return write_atomic(directory / "report.html", render(evaluation, decode))


def rules() -> dict[str, str]:
    """Return every figure's counting rule in words, by field name."""
    fields = {**ModeMetrics.model_fields, **PositionAgreement.model_fields, "aup": Area.model_fields["aup"]}
    return {name: field.description or "" for name, field in fields.items()}


def metrics_json(evaluation: Evaluation) -> str:
    """Return all figures, settings, versions and counting rules as JSON."""
    return json.dumps({**evaluation.model_dump(mode="json"), "rules": rules()}, indent=2, ensure_ascii=False) + "\n"


def render(evaluation: Evaluation, decode: Decode) -> str:
    """Return the page. It escapes all text from outside, controls of its direction included, and loads nothing."""
    script = _resource("report.js")
    samples = _samples(evaluation, decode)
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    page = environment.from_string(_resource("report.html.j2")).render(
        evaluation=evaluation,
        prompts=max(metrics.prompts for metrics in evaluation.modes.values()),
        speedups=_speedups(evaluation),
        charts=_charts(evaluation),
        samples=samples,
        shown_first=_shown_first(evaluation.modes),
        traces=inline_json([[_replay(output.trace) for output in sample.outputs] for sample in samples]),
        rules=rules(),
        display=display,
        mode_class=display.mode_class,
        style=Markup(_resource("report.css")),
        light=Markup(display.mode_colours(dark=False)),
        dark=Markup(display.mode_colours(dark=True)),
        script=Markup(script),
        digest=_digest(script),
    )
    return visible(page)


def _resource(name: str) -> str:
    return files(__package__).joinpath(name).read_text(encoding="utf-8")


def _digest(script: str) -> str:
    """Return the hash by which the page's security policy admits this script and no other."""
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def inline_json(value: JsonValue) -> Markup:
    """Return JSON for a script element, without a character that means anything to HTML."""
    written = json.dumps(value, separators=(",", ":"))  # ASCII only
    for character in "<>&":
        written = written.replace(character, f"\\u{ord(character):04x}")
    return Markup(written)


def _samples(evaluation: Evaluation, decode: Decode) -> list[Sample]:
    """Collect the records of the first prompts, each mode's at its main settings."""
    by_prompt: dict[int, list[LoggedRecord]] = {}
    for mode, metrics in evaluation.modes.items():
        for row in evaluation.records:
            index = row.decoded.prompt_index
            if row.mode == mode and row.settings == metrics.settings and index < SAMPLES:
                by_prompt.setdefault(index, []).append(row)
    return [
        Sample(rows[0].prompt, rows[0].answer, [Output(row, trace(row.decoded, decode)) for row in rows])
        for _, rows in sorted(by_prompt.items())
    ]


def _replay(trace: Trace) -> JsonValue:
    """Return what the script needs of a trace; the text is on the page."""
    return {
        "steps": [piece.step for piece in trace.pieces],
        "positions": [piece.position for piece in trace.pieces],
        "drafts": [
            {**draft.model_dump(), "texts": [visible(text) for text in draft.texts]} for draft in trace.drafts
        ],
        "frames": [frame.model_dump() for frame in trace.frames],
    }


def _shown_first(modes: dict[str, ModeMetrics]) -> str:
    """Return the mode that the replay opens with: one that drafts, if there is one."""
    return next((mode for mode, metrics in modes.items() if metrics.agreement), list(modes)[-1])


def _speedups(evaluation: Evaluation) -> dict[str, float]:
    """Return tokens per second over those of the ar run, by mode; empty without an ar run or without times."""
    ar = evaluation.modes.get("ar")
    if ar is None or not ar.tokens_per_second:
        return {}
    rates = {mode: metrics.tokens_per_second for mode, metrics in evaluation.modes.items() if mode != "ar"}
    return {mode: rate / ar.tokens_per_second for mode, rate in rates.items() if rate}


def _charts(evaluation: Evaluation) -> list[Chart]:
    """Return each chart that there is data for."""
    return [
        Chart(
            "Tokens per forward",
            "New tokens for each call of the model, all calls counted. The pale tip leaves out the prefill.",
            charts.tpf_bars(evaluation.modes),
        ),
        Chart(
            "Where the forwards go",
            "Calls of the model for 100 new tokens, by what the call was for.",
            charts.forwards_bars(evaluation.modes),
        ),
        *_speed_chart(evaluation),
        *(_acceptance_chart(mode, m) for mode, m in evaluation.modes.items() if m.agreement),
    ]


def _speed_chart(evaluation: Evaluation) -> list[Chart]:
    points = evaluation.points
    if len(points) < 2 or any(point.metrics.accuracy is None for point in points):
        return []
    caption = "The grey line is the front: the settings that no other beats. Hollow points are beaten."
    by_mode = ([point for point in evaluation.sweep if point.mode == mode] for mode in evaluation.modes)
    varied = dict.fromkeys(name for points_of_mode in by_mode for name in varied_settings(points_of_mode))
    if varied:
        caption += f" Numbers: {' \N{MULTIPLICATION SIGN} '.join(name.replace('_', ' ') for name in varied)}."
    return [Chart("Accuracy against speed", caption, charts.speed_curves(points), list(evaluation.modes))]


def _acceptance_chart(mode: str, metrics: ModeMetrics) -> Chart:
    caption = (
        f"{display.title(mode)}: how often the verifier agrees with the drafted token, in the cycles that reach "
        "the position and in every cycle. Shaded: share of cycles that reach it. Hollow: fewer than "
        f"{charts.FEW} cycles. A cycle commits {display.decimal(metrics.acceptance_length)} tokens on average."
    )
    return Chart("Acceptance by position", caption, charts.acceptance_curve(mode, metrics.agreement))
