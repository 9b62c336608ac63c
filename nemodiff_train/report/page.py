"""The parts that all pages share: charts, a replay of the first outputs, and a template that loads no other file."""

import base64
import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from importlib.resources import files

from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup
from pydantic import JsonValue

from nemodiff_train.errors import escape_controls
from nemodiff_train.evaluation.evaluation import Evaluation
from nemodiff_train.evaluation.metrics import ModeMetrics
from nemodiff_train.evaluation.records import LoggedRecord
from nemodiff_train.report import display
from nemodiff_train.report.trace import Detokenize, Trace, trace

SAMPLES = 6
"""Maximum number of prompts whose outputs are replayed, from the first."""


@dataclass(frozen=True)
class Output:
    """One mode's output for a sample prompt."""

    record: LoggedRecord
    trace: Trace


@dataclass(frozen=True)
class PromptOutputs:
    """One prompt with every mode's output at its main settings."""

    prompt: str
    answer: str | None
    outputs: list[Output]


@dataclass(frozen=True)
class Chart:
    """One drawing of a page."""

    heading: str
    caption: str
    drawing: Markup
    modes: Sequence[str] = ()
    """Modes to name by colour below the caption."""


@cache
def _resource(name: str) -> str:
    return files(__package__).joinpath(name).read_text(encoding="utf-8")


_ENVIRONMENT = Environment(
    loader=FunctionLoader(_resource), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
)


def render(template: str, samples: Sequence[PromptOutputs], modes: dict[str, ModeMetrics], **values: object) -> str:
    """Return a page, which loads nothing; text from outside is escaped, its control characters included.

    Args:
        template: A file beside this module, made from ``base.html.j2``.
        samples: What :func:`samples_of` returned.
        modes: Figures of the modes that the samples were decoded in.
        values: What else the template names.
    """
    script = _resource("report.js")
    page = _ENVIRONMENT.get_template(template).render(
        **values,
        samples=samples,
        modes=modes,
        # The replay opens with a mode that drafts, if there is one.
        shown_first=next(
            (mode for mode, metrics in modes.items() if metrics.acceptance_by_position), next(reversed(modes), None)
        ),
        traces=inline_json([[_replay(output.trace) for output in sample.outputs] for sample in samples]),
        display=display,
        mode_class=display.mode_class,
        style=Markup(_resource("report.css")),
        light=Markup(display.mode_colours(dark=False)),
        dark=Markup(display.mode_colours(dark=True)),
        script=Markup(script),
        # By this hash the page's security policy admits the script and no other.
        digest="sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )
    return escape_controls(page)


def inline_json(value: JsonValue) -> Markup:
    """Return JSON for a script element, without a character that means anything to HTML."""
    written = json.dumps(value, separators=(",", ":"))  # ASCII only
    for character in "<>&":
        written = written.replace(character, f"\\u{ord(character):04x}")
    return Markup(written)


def samples_of(evaluation: Evaluation, detokenize: Detokenize) -> list[PromptOutputs]:
    """Collect the records of the first prompts, each mode's at its main settings."""
    by_prompt: dict[int, list[LoggedRecord]] = {}
    for mode, metrics in evaluation.modes.items():
        for row in evaluation.records:
            index = row.decoded.prompt_index
            if row.mode == mode and row.settings == metrics.settings and index < SAMPLES:
                by_prompt.setdefault(index, []).append(row)
    return [
        PromptOutputs(rows[0].prompt, rows[0].answer, [Output(row, trace(row.decoded, detokenize)) for row in rows])
        for _, rows in sorted(by_prompt.items())
    ]


def _replay(trace: Trace) -> JsonValue:
    """Return what the script needs of a trace; the text is on the page."""
    return {
        "steps": [piece.step for piece in trace.pieces],
        "positions": [piece.position for piece in trace.pieces],
        "drafts": [
            {**asdict(draft), "texts": [escape_controls(text) for text in draft.texts]} for draft in trace.drafts
        ],
        "frames": [asdict(frame) for frame in trace.frames],
    }
