"""The console, which text from outside cannot steer, and one style of progress bar."""

import contextlib
import os
import time
from collections.abc import Iterable, Iterator
from datetime import timedelta
from typing import Protocol

from rich.console import Console, ConsoleOptions, RenderableType
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.segment import Segment

from nemodiff_train.distributed import is_main_process
from nemodiff_train.shown import visible


class PlainConsole(Console):
    """A console on which text is text: brackets are no markup, control codes are spelled out.

    Args:
        stderr: Whether it writes to standard error.
        width: In characters; None for that of the terminal.
    """

    def __init__(self, *, stderr: bool = False, width: int | None = None) -> None:
        super().__init__(stderr=stderr, width=width, highlight=False, markup=False, emoji=False)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Return the parts of what is printed; rich's own movements of the cursor are no text."""
        for text, style, control in super().render(renderable, options):
            yield Segment(text if control else visible(text), style, control)


console = PlainConsole(stderr=True)


def say(line: str, style: str = "") -> None:
    """Print one line from rank 0."""
    if is_main_process():
        console.print(line, style=style, soft_wrap=True)


def warn(line: str) -> None:
    """Print one yellow line, from rank 0."""
    say(line, "yellow")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Drop the output of third parties; ``NEMODIFF_LOG=1`` shows it."""
    if os.environ.get("NEMODIFF_LOG"):
        yield
        return
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        yield


def progress_bar(*extra_columns: str, shown: bool | None = None) -> Progress:
    """Return a progress bar, for use as a context manager.

    Args:
        *extra_columns: Rich markup shown after the bar, for example ``"{task.fields[rate]}"``.
        shown: Whether this process shows it; by default only rank 0 does.
    """
    columns = (MofNCompleteColumn(), *map(TextColumn, extra_columns))
    return _bar(*columns, shown=is_main_process() if shown is None else shown)


def bytes_bar() -> Progress:
    """Return a progress bar that counts bytes and shows bytes per second; it disappears when done.

    It is shown on a terminal only: in a file it would leave one line per bar.
    """
    shown = is_main_process() and console.is_interactive
    return _bar(DownloadColumn(), TransferSpeedColumn(), shown=shown, transient=True)


def _bar(*columns: ProgressColumn, shown: bool, transient: bool = False) -> Progress:
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        *columns,
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=transient,
        disable=not shown,
    )


LINE_SECONDS = 30.0
"""Between two lines of a loop where there is no terminal."""


class Advance(Protocol):
    """Tells how much further a loop is."""

    def __call__(self, count: int, units: int = 0, before: int = 0) -> None:
        """Show that more is done.

        Args:
            count: How many more.
            units: How many units have been made meanwhile, whose number per second is shown.
            before: How many of all that are done so far took no time, as an earlier start had done them.
        """


@contextlib.contextmanager
def told_progress(description: str, total: int, unit: str = "") -> Iterator[Advance]:
    """Show how far a loop is and how long it will take: a bar on a terminal, elsewhere a line now and then.

    Args:
        description: What is counted.
        total: Number of it.
        unit: Name of the units that are made, in the plural; empty for none.

    Yields:
        The function to call.
    """
    done, units_done, started = 0, 0, time.monotonic()
    last_line = started
    columns = [f"{{task.fields[speed]:,.0f}} {unit}/s"] if unit else []
    with progress_bar(*columns, shown=is_main_process() and console.is_terminal) as bar:
        task = bar.add_task(description, total=total, speed=0.0)

        def advance(count: int, units: int = 0, before: int = 0) -> None:
            nonlocal done, units_done, last_line
            done, units_done, now = done + count, units_done + units, time.monotonic()
            spent = now - started
            bar.update(task, advance=count, speed=units_done / spent)
            if console.is_terminal or (now - last_line < LINE_SECONDS and done < total):
                return
            last_line = now
            speed = f", {units_done / spent:,.0f} {unit}/s" if unit else ""
            left = timedelta(seconds=round(spent / (done - before) * (total - done))) if done > before else "?"
            say(f"{description}: {done:,}/{total:,} in {timedelta(seconds=round(spent))}{speed}, {left} left")

        yield advance
