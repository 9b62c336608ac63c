"""Errors that are meant for a user, and escapes for text from outside."""

import difflib
import errno
import re
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path

_CONTROLS = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]|\r(?!\n)"
)
"""Control codes, line separators, bidirectional controls, and halves of characters that cannot be encoded."""


class UserError(Exception):
    """Bad input: one line that says what is wrong, where, and what to do.

    The command line prints it without a traceback and exits with code 2.  Raise it before
    anything is written.
    """

    def __init__(self, message: str) -> None:
        super().__init__(escape_to_one_line(message))


class RunStopped(Exception):
    """A run that cannot continue: one line that says why, and what to do.

    The command line prints it without a traceback and exits with code 1.

    Args:
        line: Message to print.
        alone: Whether only this rank raises it, so that it prints the message whatever its number.
    """

    def __init__(self, line: str, *, alone: bool = False) -> None:
        super().__init__(escape_to_one_line(line))
        self.alone = alone


def refusal(call: Callable[[], object]) -> list[str]:
    """Return the message of the ``UserError`` that a call raises, or an empty list."""
    try:
        call()
    except UserError as error:
        return [str(error)]
    return []


def disk_is_full(error: BaseException | None) -> bool:
    """Return whether an error says that the disk, or the user's quota, is full."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


def line_in(error: BaseException, path: Path) -> int | None:
    """Return the line of a file, or of a file of a folder, that raised an error; None if another file did."""
    frames = traceback.extract_tb(error.__traceback__)
    inside = frames and Path(frames[-1].filename).absolute().is_relative_to(path.absolute())
    return frames[-1].lineno if inside else None


def nearest(name: str, known: Iterable[str]) -> str:
    """Return ``" Did you mean 'x'?"`` for the known name closest to ``name``, or an empty string."""
    matches = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" Did you mean '{matches[0]}'?" if matches else ""


def escape_controls(text: str) -> str:
    """Escape what could steer a terminal or make a text look like another one; line breaks stay."""
    return _CONTROLS.sub(lambda match: _escaped(match[0]), text)


def escape_to_one_line(text: str) -> str:
    """Escape every character that is not printable, line breaks included."""
    return "".join(character if character.isprintable() else _escaped(character) for character in text)


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode()
