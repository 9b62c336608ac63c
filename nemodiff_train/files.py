"""Writing so that a reader never sees half a file."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nemodiff_train.distributed import barrier, is_main_process
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


def check_can_be_made(directory: Path) -> None:
    """Refuse a folder that exists as something else, or below which nothing can be written; makes nothing.

    Raises:
        UserError: Names it.
    """
    there = directory
    while not there.exists() and there != there.parent:
        there = there.parent
    if not there.is_dir():
        raise UserError(f"cannot make the folder '{directory}': '{there}' is a file")
    # What the kernel shows as files lets root write anywhere, and makes nothing.
    if not os.access(there, os.W_OK | os.X_OK) or there.is_relative_to("/proc") or there.is_relative_to("/sys"):
        raise UserError(f"cannot make the folder '{directory}': '{there}' cannot be written to")


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


def check_free(output: Path) -> None:
    """Refuse an output that exists, or that no folder can be made for; makes nothing.

    Raises:
        UserError: Names the output.
    """
    if output.exists():
        raise UserError(f"'{output}' exists already; name a folder that does not, or remove it")
    check_can_be_made(output.parent)


@contextmanager
def atomic_directory(output: Path) -> Iterator[Path]:
    """A folder to write into that becomes ``output`` on success and vanishes on failure.

    Every process of a gang enters and leaves it; one that fails takes the folder with it, so that the
    others cannot finish.

    Raises:
        UserError: The disk is full, or cannot be written to.
    """
    check_free(output)
    partial = output.with_name(f".{output.name}.partial")
    barrier()
    if is_main_process():
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    barrier()
    try:
        yield partial
        barrier()
        if is_main_process():
            partial.rename(output)
        barrier()
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise UserError(f"cannot write '{output}': {error.strerror or error}") from None
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
