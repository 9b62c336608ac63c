"""The result on the terminal."""

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from nemodiff_train.evaluation.evaluation import Evaluation
from nemodiff_train.report.compare import Change, Comparison
from nemodiff_train.report.display import COLUMNS, COUNTING_RULE, FIGURES, difference

LISTED = 12
"""Changed prompts that the terminal names; the page has them all."""


def print_table(evaluation: Evaluation, console: Console | None = None) -> None:
    """Print one row for each mode and the counting rule, to standard output unless ``console`` is given."""
    prompts = max(metrics.prompts for metrics in evaluation.modes.values())
    table = _table(f"{evaluation.checkpoint}\n{evaluation.task}, {prompts} prompts", COUNTING_RULE)
    table.add_column("Mode", no_wrap=True)
    for column in COLUMNS:
        table.add_column(f"{column.first}\n{column.second}".strip(), justify="right", vertical="bottom", no_wrap=True)
    for mode, metrics in evaluation.modes.items():
        table.add_row(Text(mode), *(column.text(metrics) for column in COLUMNS))
    (console or Console(highlight=False)).print(table)


def print_comparison(comparison: Comparison, console: Console | None = None) -> None:
    """Print three rows for each mode (A, B, B - A) and which answers changed, to standard output by default."""
    a, b = comparison.a, comparison.b
    title = f"A: {a.directory} ({a.checkpoint})\nB: {b.directory} ({b.checkpoint})\n{comparison.prompts} prompts"
    table = _table(title, COUNTING_RULE)
    for heading in ("Mode", ""):
        table.add_column(heading, no_wrap=True)
    for figure in FIGURES:
        table.add_column(figure.name, justify="right", no_wrap=True)
    for mode, each in comparison.modes.items():
        table.add_row(Text(mode), "A", *(figure.text(figure.of(each.a)) for figure in FIGURES))
        table.add_row("", "B", *(figure.text(figure.of(each.b)) for figure in FIGURES))
        table.add_row("", "B - A", *(difference(each.a, each.b, figure)[0] for figure in FIGURES))
    console = console or Console(highlight=False)
    console.print(table)
    for mode, each in comparison.modes.items():
        for words, changes in (("right in A, wrong in B", each.lost), ("wrong in A, right in B", each.gained)):
            console.print(Text(f"{mode}: {len(changes)} {words}{_numbers(changes)}"))


def _numbers(changes: Sequence[Change]) -> str:
    """The prompts by their numbers in A, from 1, as the report counts them."""
    if not changes:
        return ""
    shown = [str(change.prompt_index + 1) for change in changes[:LISTED]]
    return f": prompt{'s' * (len(changes) > 1)} {', '.join(shown)}{', ...' * (len(changes) > LISTED)}"


def _table(title: str, caption: str) -> Table:
    return Table(
        title=Text(title),
        caption=caption,
        box=SIMPLE_HEAD,
        collapse_padding=True,
        pad_edge=False,
        title_justify="left",
        caption_justify="left",
    )
