"""The console, which text from outside cannot steer, and one style of progress bar."""

import contextlib
import os
import time
from collections.abc import Iterable, Iterator
from datetime import timedelta
from typing import Self

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
from nemodiff_train.errors import escape_controls


class PlainConsole(Console):
    """A console on which text is text: brackets are not markup, control codes are escaped.

    Args:
        stderr: Whether it writes to standard error.
        width: In characters; None for that of the terminal.
    """

    def __init__(self, *, stderr: bool = False, width: int | None = None) -> None:
        super().__init__(stderr=stderr, width=width, highlight=False, markup=False, emoji=False)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Return the parts of what is printed; rich's own movements of the cursor are not text."""
        for text, style, control in super().render(renderable, options):
            yield Segment(text if control else escape_controls(text), style, control)


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
    """Return a progress bar that counts bytes, on a terminal alone: in a file it would leave one line per bar."""
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


class LoopProgress:
    """A context that shows how far a loop is and what time is left: a bar on a terminal, else a line now and then.

    Args:
        description: What is counted.
        total: Number of it.
        unit: Name, in the plural, of what the loop makes, whose number per second is shown; empty for none.
    """

    def __init__(self, description: str, total: int, unit: str = "") -> None:
        self._description, self._total, self._unit = description, total, unit
        self._done = self._units = 0
        self._started = self._last_line = time.monotonic()
        columns = [f"{{task.fields[speed]:,.0f}} {unit}/s"] if unit else []
        self._bar = progress_bar(*columns, shown=is_main_process() and console.is_terminal)
        self._task = self._bar.add_task(description, total=total, speed=0.0)

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()

    def advance(self, count: int, units: int = 0, before: int = 0) -> None:
        """Show that more is done.

        Args:
            count: How many more.
            units: How many units the loop has made meanwhile.
            before: How many of all that are done so far took no time, as an earlier start had done them.
        """
        self._done, self._units, now = self._done + count, self._units + units, time.monotonic()
        spent = now - self._started
        self._bar.update(self._task, advance=count, speed=self._units / spent)
        if console.is_terminal or (now - self._last_line < LINE_SECONDS and self._done < self._total):
            return
        self._last_line, timed = now, self._done - before
        speed = f", {self._units / spent:,.0f} {self._unit}/s" if self._unit else ""
        left = timedelta(seconds=round(spent / timed * (self._total - self._done))) if timed > 0 else "?"
        progress = f"{self._done:,}/{self._total:,} in {timedelta(seconds=round(spent))}"
        say(f"{self._description}: {progress}{speed}, {left} left")
