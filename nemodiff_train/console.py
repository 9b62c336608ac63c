"""What the user sees: one console, one style of progress bar."""

import os

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

console = Console(stderr=True, highlight=False)


def is_main_process() -> bool:
    """Whether this process is rank 0 of its gang (or alone); only rank 0 speaks."""
    return int(os.environ.get("RANK", "0")) == 0


def progress_bar(*extra_columns: str, disable: bool = False) -> Progress:
    """A progress bar in the project's style, for use as a context manager.

    Args:
        extra_columns: rich markup shown after the bar, for example ``"{task.fields[rate]}"``.
        disable: Show nothing (ranks other than 0).
    """
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        *(TextColumn(column) for column in extra_columns),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=disable or not is_main_process(),
    )
