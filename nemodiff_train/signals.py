"""The signals that terminate a training, and what they do until the first step."""

import functools
import os
import signal
import sys
from types import FrameType
from typing import TYPE_CHECKING

from nemodiff_train.distributed import is_main_process
from nemodiff_train.processes import ENDING

if TYPE_CHECKING:
    from sys import UnraisableHookArgs

INTERRUPTED = 128 + signal.SIGINT
"""Exit code of a command that Ctrl-C has ended."""


class TerminatedBeforeFirstStep(SystemExit):
    """The training was terminated before its first step, when there is nothing to save."""


def exit_on_signals(*numbers: int) -> None:
    """Let signals end this process, until :class:`~nemodiff_train.resilience.watchdog.Watchdog` listens to them.

    The handler raises :class:`TerminatedBeforeFirstStep`, with exit code 0, or that of an interruption after Ctrl-C.

    Args:
        numbers: SIGUSR1 and SIGINT before anything that takes time is imported; all ``ENDING`` when the settings
            have been checked: until then SIGTERM ends a rank as a launcher expects, whose first one may refuse them.
    """
    for number in numbers:
        signal.signal(number, _leave)


def restore_signal_handlers() -> None:
    """Give the signals their usual handlers back, when the training is over."""
    for number in ENDING:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)


def _leave(number: int, frame: FrameType | None) -> None:
    for ending in ENDING:
        signal.signal(ending, signal.SIG_IGN)  # while the process cleans up
    announce(number)
    exit_error, hook = TerminatedBeforeFirstStep(code_after(number)), sys.unraisablehook

    def leave(number: int, frame: FrameType | None) -> None:
        raise exit_error

    def raise_again(lost: "UnraisableHookArgs") -> None:
        """Raise once more, moments later, what came while Python ran a callback that may not raise."""
        if lost.exc_value is not exit_error:
            hook(lost)
            return
        signal.signal(signal.SIGALRM, leave)
        signal.setitimer(signal.ITIMER_REAL, 0.01)

    sys.unraisablehook = raise_again
    raise exit_error


@functools.cache
def announce(number: int) -> None:
    """Say once, on rank 0, that a signal ends the training before its first step."""
    if is_main_process():
        name = signal.Signals(number).name
        # Not by print, which fails where the signal has interrupted one.
        os.write(2, f"nemodiff: {name} before the first step; repeat the command to resume\n".encode())


def code_after(number: int) -> int:
    """Return the exit code of a training that a signal has ended before its first step."""
    return INTERRUPTED if number == signal.SIGINT else 0
