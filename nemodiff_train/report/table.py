"""The figures of an evaluation as a table on the terminal."""

from rich.box import SIMPLE_HEAD
from rich.table import Table

from nemodiff_train.console import PlainConsole
from nemodiff_train.evaluation.evaluation import Evaluation
from nemodiff_train.report.display import COLUMNS, COUNTING_RULE


def print_table(evaluation: Evaluation, console: PlainConsole | None = None) -> None:
    """Print one row per mode and the counting rule, to standard output unless ``console`` is given."""
    prompts = max(metrics.prompts for metrics in evaluation.modes.values())
    table = Table(
        title=f"{evaluation.checkpoint}\n{evaluation.task}, {prompts} prompts",
        caption=COUNTING_RULE,
        box=SIMPLE_HEAD,
        collapse_padding=True,
        pad_edge=False,
        title_justify="left",
        caption_justify="left",
    )
    table.add_column("Mode", no_wrap=True)
    for column in COLUMNS:
        table.add_column(f"{column.first}\n{column.second}".strip(), justify="right", vertical="bottom", no_wrap=True)
    for mode, metrics in evaluation.modes.items():
        table.add_row(mode, *(column.text(metrics) for column in COLUMNS))
    (console or PlainConsole()).print(table)
