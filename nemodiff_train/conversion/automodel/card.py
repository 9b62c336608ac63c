"""The model card of a directory that decodes itself: base model, licence, results and usage."""

from pathlib import Path
from typing import Any, TypedDict

import yaml
from jinja2 import StrictUndefined, Template
from pydantic import with_config

from nemodiff_train.errors import UserError
from nemodiff_train.model.families import HFConfig
from nemodiff_train.schema import AS_WRITTEN, checked, read_json

_TEMPLATE = Path(__file__).with_name("card.md.j2")
_FIGURES = {
    "accuracy": "accuracy",
    "tpf_all": "TPF (all)",
    "tpf_no_prefill": "TPF (no prefill)",
    "acceptance_length": "acceptance length",
    "identical_to_ar": "identical to AR",
}
"""Columns of the results, by their names in ``metrics.json``."""


class _Figures(TypedDict, total=False):
    accuracy: float | None
    tpf_all: float | None
    tpf_no_prefill: float | None
    acceptance_length: float | None
    identical_to_ar: float | None


@with_config(AS_WRITTEN)
class _Results(TypedDict):
    task: str
    modes: dict[str, _Figures]


def read_results(folder: str) -> dict[str, Any]:
    """Return an evaluation's ``metrics.json``.

    Args:
        folder: Output of ``nemodiff eval``.

    Raises:
        UserError: It is not there, or holds something else.
    """
    file = Path(folder) / "metrics.json"
    if not file.is_file():
        raise UserError(f"--results: '{file}' is missing; name the --output of a 'nemodiff eval'")
    results = read_json(file)
    checked(_Results, results, file, "name the --output of a 'nemodiff eval'")
    return results


def write_card(directory: Path, settings: HFConfig, origin: HFConfig, results: dict[str, Any] | None) -> None:
    """Write ``README.md``.

    Args:
        directory: Where weights, code and configuration are.
        settings: The ``config.json``.
        origin: Name and licence of the model that it was made from.
        results: What :func:`read_results` returned, or None.
    """
    head = {**origin, "library_name": "transformers", "pipeline_tag": "text-generation"}
    rows = [
        [mode, *(_written(figures.get(name), name) for name in _FIGURES)]
        for mode, figures in (results or {"modes": {}})["modes"].items()
    ]
    template = Template(_TEMPLATE.read_text(), undefined=StrictUndefined, keep_trailing_newline=True)
    text = template.render(
        settings,
        head=yaml.safe_dump(head, sort_keys=False, allow_unicode=True),
        origin=origin,
        family=settings["text_config"]["architectures"][0],
        causal=settings["clean_attention"] == "causal",
        drafter=(directory / "linear_spec_lora").is_dir(),
        results=results,
        columns=list(_FIGURES.values()),
        rows=rows,
    )
    (directory / "README.md").write_text(text, encoding="utf-8")


def _written(value: float | None, name: str) -> str:
    """Return a figure as it stands in a table; shares of 1 in per cent."""
    if value is None:
        return ""
    return f"{value:.1%}" if name in ("accuracy", "identical_to_ar") else f"{value:.2f}"
