"""The result on the terminal."""

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from nemodiff_train.evaluation.compare import Comparison
from nemodiff_train.evaluation.display import COLUMNS, COUNTING_RULE, FIGURES, difference
from nemodiff_train.evaluation.evaluation import Evaluation


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
    """Print three rows for each mode (A, B, B - A) and the changed answers, to standard output by default."""
    a, b = comparison.a, comparison.b
    title = f"A: {a.directory} ({a.checkpoint})\nB: {b.directory} ({b.checkpoint})\n{comparison.prompts} prompts"
    table = _table(title, f"{COUNTING_RULE} p: exact McNemar test.")
    for heading in ("Mode", ""):
        table.add_column(heading, no_wrap=True)
    for figure in FIGURES:
        table.add_column(figure.name, justify="right", no_wrap=True)
    table.add_column("Answers", no_wrap=True)
    for mode, each in comparison.modes.items():
        table.add_row(Text(mode), "A", *(figure.text(figure.of(each.a)) for figure in FIGURES))
        table.add_row("", "B", *(figure.text(figure.of(each.b)) for figure in FIGURES))
        answers = f"{len(each.gained)} gained, {len(each.lost)} lost, p {each.p_value:.2g}"
        table.add_row("", "B - A", *(difference(each.a, each.b, figure)[0] for figure in FIGURES), answers)
    (console or Console(highlight=False)).print(table)


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
