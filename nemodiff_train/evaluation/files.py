"""Writing so that a reader never sees half a file."""

import os
from pathlib import Path

from nemodiff_train.errors import UserError


def usable_directory(directory: Path) -> Path:
    """Make ``directory`` if needed and return it; call it before a long run, not after.

    Raises:
        UserError: It cannot be made or written to.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the output directory {directory}: {error.strerror}") from error
    if not os.access(directory, os.W_OK | os.X_OK):
        raise UserError(f"the output directory {directory} is not writable")
    return directory


def write_atomic(path: Path, text: str) -> Path:
    """Write ``text`` as UTF-8 to ``path`` by way of a temporary file in the same directory.

    The file is complete and on disk before it takes its name; on any failure an older file stays.
    """
    # Not tempfile: its files are private (0600), and rename would keep that.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8", newline="\n") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return path
