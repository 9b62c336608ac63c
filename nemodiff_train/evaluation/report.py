"""Writes the evaluation: figures for machines, a page for people."""

import csv
import io
import json
from importlib.resources import files
from pathlib import Path

from jinja2 import DictLoader, Environment, StrictUndefined
from markupsafe import Markup

from nemodiff_train.evaluation import charts, display
from nemodiff_train.evaluation.evaluation import Evaluation
from nemodiff_train.evaluation.files import usable_directory, write_atomic
from nemodiff_train.evaluation.metrics import ModeMetrics, PlaceAgreement
from nemodiff_train.evaluation.records import KINDS, write_records

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
    fields = {**ModeMetrics.model_fields, **PlaceAgreement.model_fields}
    return {name: field.description or "" for name, field in fields.items()}


def metrics_json(evaluation: Evaluation) -> str:
    """All figures, settings and versions, with ``rules`` beside them."""
    return json.dumps({**evaluation.model_dump(mode="json"), "rules": rules()}, indent=2, ensure_ascii=False) + "\n"


def metrics_csv(evaluation: Evaluation) -> str:
    """One row a run: the modes, then the sweep with its thresholds. An empty cell: not applicable."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["run", "mode", "threshold", *_SCALARS, *(f"forwards_{kind}" for kind in KINDS)])
    for mode, metrics in evaluation.modes.items():
        writer.writerow(["mode", mode, metrics.settings.get("threshold", ""), *_cells(metrics)])
    for threshold, metrics in evaluation.sweep:
        writer.writerow(["sweep", "diffusion", threshold, *_cells(metrics)])
    return out.getvalue()


def _cells(metrics: ModeMetrics) -> list[object]:
    return [
        *(getattr(metrics, name) for name in _SCALARS),
        *(metrics.forwards.get(kind, 0) for kind in KINDS),
    ]


def render(evaluation: Evaluation) -> str:
    """The page. All text from outside is escaped; it loads nothing."""
    here = files(__package__)
    environment = Environment(
        loader=DictLoader({"report": here.joinpath("report.html.j2").read_text(encoding="utf-8")}),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report").render(
        style=Markup(here.joinpath("report.css").read_text(encoding="utf-8")),
        evaluation=evaluation,
        prompts=max(metrics.prompts for metrics in evaluation.modes.values()),
        speedups=_speedups(evaluation),
        columns=display.COLUMNS,
        pictures=_pictures(evaluation),
        rules=rules(),
        display=display,
        mode_class=charts.mode_class,
    )


def _speedups(evaluation: Evaluation) -> dict[str, float]:
    """Tokens a second over the ar run's, by mode; empty without an ar run or without times."""
    ar = evaluation.modes.get("ar")
    if ar is None or not ar.tokens_per_second:
        return {}
    rates = {mode: metrics.tokens_per_second for mode, metrics in evaluation.modes.items() if mode != "ar"}
    return {mode: rate / ar.tokens_per_second for mode, rate in rates.items() if rate}


def _pictures(evaluation: Evaluation) -> list[tuple[str, str, Markup]]:
    """Title, caption and drawing of each picture that there is data for."""
    pictures = [
        (
            "Tokens per forward",
            "New tokens for each call of the model, all calls counted. The pale tip leaves out the prefill.",
            charts.tpf_bars(evaluation.modes),
        ),
        (
            "Where the forwards go",
            "Calls of the model for 100 new tokens, by what the call was for.",
            charts.forwards_bars(evaluation.modes),
        ),
    ]
    if evaluation.sweep:
        caption = "Block diffusion at each confidence threshold (the number beside its point)."
        pictures.append(("Accuracy against speed", caption, charts.sweep_curve(evaluation)))
    for mode, metrics in evaluation.modes.items():
        if metrics.agreement:
            caption = (
                f"{display.title(mode)}: how often the verifier agrees with the drafted token, in the cycles "
                "that reach the place and in every cycle. Shaded: share of cycles that reach it."
            )
            pictures.append(
                ("Agreement by place in the block", caption, charts.agreement_curve(mode, metrics.agreement))
            )
    return pictures
