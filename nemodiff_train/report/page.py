"""What the pages share: one file each, nothing loaded, all text from outside escaped."""

import base64
import hashlib
import json
from importlib.resources import files

from jinja2 import DictLoader, Environment, StrictUndefined
from markupsafe import Markup
from pydantic import JsonValue

from nemodiff_train.report import display

TEMPLATES = ("page", "report", "comparison")


def render_page(template: str, **values: object) -> str:
    """Fill one of the templates; the style sheet, the script and `display` are there for all."""
    script = _read("report.js")
    environment = Environment(
        loader=DictLoader({name: _read(f"{name}.html.j2") for name in TEMPLATES}),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(
        style=Markup(_read("report.css")),
        light=Markup(display.mode_colours(dark=False)),
        dark=Markup(display.mode_colours(dark=True)),
        script=Markup(script),
        digest=script_digest(script),
        display=display,
        mode_class=display.mode_class,
        **values,
    )


def script_digest(script: str) -> str:
    """What the page's security policy names the script by, so that no other one can run."""
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def inline_json(value: JsonValue) -> Markup:
    """JSON that may stand inside a script element: no character of it means anything to HTML."""
    written = json.dumps(value, separators=(",", ":"))  # ASCII only
    for character in "<>&":
        written = written.replace(character, f"\\u{ord(character):04x}")
    return Markup(written)


def _read(name: str) -> str:
    return files(__package__).joinpath(name).read_text(encoding="utf-8")
