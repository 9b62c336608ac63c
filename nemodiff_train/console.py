"""The console, which text from outside cannot steer, and one style of progress bar."""

import contextlib
import os
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta

from rich.console import Console, ConsoleOptions, RenderableType
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
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
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        *(TextColumn(column) for column in extra_columns),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not (is_main_process() if shown is None else shown),
    )


LINE_SECONDS = 30.0
"""Between two lines of a loop where there is no terminal."""


@contextlib.contextmanager
def told_progress(description: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show how far a loop is and how long it will take: a bar on a terminal, elsewhere a line now and then.

    Args:
        description: What is counted.
        total: Number of it.

    Yields:
        A function that takes how many more are done.
    """
    done, started = 0, time.monotonic()
    told = started
    with progress_bar(shown=is_main_process() and console.is_terminal) as bar:
        task = bar.add_task(description, total=total)

        def advance(count: int) -> None:
            nonlocal done, told
            done, now = done + count, time.monotonic()
            bar.advance(task, count)
            if not console.is_terminal and (now - told >= LINE_SECONDS or done >= total):
                spent, told = now - started, now
                left = timedelta(seconds=round(spent / done * (total - done)))
                say(f"{description}: {done}/{total} in {timedelta(seconds=round(spent))}, {left} left")

        yield advance


def bytes_bar() -> Progress:
    """Return a progress bar that counts bytes and shows bytes per second; it disappears when done.

    It is shown on a terminal only: in a file it would leave one line per bar.
    """
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not (is_main_process() and console.is_interactive),
    )
