"""Show an evaluation: figures and records as JSON, a page to look at, and a table on the terminal."""

import json
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.table import Table

from nemodiff_train.console import PlainConsole
from nemodiff_train.evaluation.evaluation import Evaluation
from nemodiff_train.evaluation.metrics import ModeMetrics, PositionAcceptance
from nemodiff_train.evaluation.pareto import Area, varied_settings
from nemodiff_train.evaluation.records import write_records
from nemodiff_train.files import usable_directory, write_atomic
from nemodiff_train.report import charts, display, page
from nemodiff_train.report.page import Chart
from nemodiff_train.report.trace import Detokenize


def write_report(directory: Path, evaluation: Evaluation, detokenize: Detokenize) -> Path:
    """Write ``records.jsonl``, ``metrics.json`` and ``report.html``, each atomically.

    Args:
        directory: Created if it does not exist.
        evaluation: The figures and the records.
        detokenize: Turns tokens into text, for the replay.

    Returns:
        The path of ``report.html``, which needs no other file.

    Raises:
        UserError: The directory cannot be created or written to.
    """
    usable_directory(directory)
    write_records(directory / "records.jsonl", evaluation.records)
    write_atomic(directory / "metrics.json", metrics_json(evaluation))
    html = page.render(
        "report.html.j2",
        page.samples_of(evaluation, detokenize),
        evaluation.modes,
        evaluation=evaluation,
        prompts=max(metrics.prompts for metrics in evaluation.modes.values()),
        speedups=_speedups(evaluation),
        charts=_charts(evaluation),
        rules=_rules(),
    )
    return write_atomic(directory / "report.html", html)


def metrics_json(evaluation: Evaluation) -> str:
    """Return all figures, settings, versions and counting rules as JSON."""
    return json.dumps({**evaluation.model_dump(mode="json"), "rules": _rules()}, indent=2, ensure_ascii=False) + "\n"


def print_table(evaluation: Evaluation) -> None:
    """Print one row per mode and the counting rule to standard output."""
    prompts = max(metrics.prompts for metrics in evaluation.modes.values())
    table = Table(
        title=f"{evaluation.checkpoint}\n{evaluation.task}, {prompts} prompts",
        caption=display.COUNTING_RULE,
        box=SIMPLE_HEAD,
        collapse_padding=True,
        pad_edge=False,
        title_justify="left",
        caption_justify="left",
    )
    table.add_column("Mode", no_wrap=True)
    for column in display.COLUMNS:
        table.add_column(column.heading, justify="right", vertical="bottom", no_wrap=True)
    for mode, metrics in evaluation.modes.items():
        table.add_row(mode, *(column.text(metrics) for column in display.COLUMNS))
    PlainConsole().print(table)


def _rules() -> dict[str, str]:
    """Return every figure's counting rule in words, by field name."""
    fields = {**ModeMetrics.model_fields, **PositionAcceptance.model_fields, "aup": Area.model_fields["aup"]}
    return {name: field.description or "" for name, field in fields.items()}


def _speedups(evaluation: Evaluation) -> dict[str, float]:
    """Return tokens per second over those of the ar run, by mode; empty without an ar run or without times."""
    ar = evaluation.modes.get("ar")
    if ar is None or not ar.tokens_per_second:
        return {}
    rates = {mode: metrics.tokens_per_second for mode, metrics in evaluation.modes.items() if mode != "ar"}
    return {mode: rate / ar.tokens_per_second for mode, rate in rates.items() if rate}


def _charts(evaluation: Evaluation) -> list[Chart]:
    """Return each chart that there is data for."""
    modes, points = evaluation.modes, evaluation.points
    caption = "New tokens for each call of the model, all calls counted. The pale tip leaves out the prefill."
    drawn = [Chart("Tokens per forward", caption, charts.tpf_bars(modes))]
    caption = "Calls of the model for 100 new tokens, by what the call was for."
    drawn.append(Chart("Where the forwards go", caption, charts.forwards_bars(modes)))
    if len(points) > 1 and all(point.metrics.accuracy is not None for point in points):
        caption = "The grey line is the front: the settings that no other beats. Hollow points are beaten."
        by_mode = ([point for point in evaluation.sweep if point.mode == mode] for mode in modes)
        varied = dict.fromkeys(name for points_of_mode in by_mode for name in varied_settings(points_of_mode))
        if varied:
            caption += f" Numbers: {' \N{MULTIPLICATION SIGN} '.join(name.replace('_', ' ') for name in varied)}."
        drawn.append(Chart("Accuracy against speed", caption, charts.speed_curves(points), list(modes)))
    for mode, metrics in modes.items():
        if metrics.acceptance_by_position:
            caption = (
                f"{display.title(mode)}: how often the verifier accepts the drafted token, in the cycles that "
                "reach the position and in every cycle. Shaded: share of cycles that reach it. Hollow: fewer "
                f"than {charts.FEW} cycles. A cycle commits {display.decimal(metrics.acceptance_length)} tokens on "
                "average."
            )
            drawing = charts.acceptance_curve(mode, metrics.acceptance_by_position)
            drawn.append(Chart("Acceptance by position", caption, drawing))
    return drawn
