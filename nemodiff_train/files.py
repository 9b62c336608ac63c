"""Write files and folders so that a reader never sees half of one, nor a crash leaves it."""

import errno
import fcntl
import hashlib
import os
import shutil
import socket
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Self

from nemodiff_train.console import warn
from nemodiff_train.distributed import barrier, is_main_process
from nemodiff_train.errors import UserError


def usable_directory(directory: Path) -> Path:
    """Make a folder where needed and return it; call this before a long run, not after.

    Raises:
        UserError: It cannot be made or written to.
    """
    check_can_be_made(directory)
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:  # such as a link that leads nowhere
        raise UserError(f"cannot make the folder '{directory}': {str(error.strerror).lower()}") from error
    return directory


def check_can_be_made(directory: Path) -> None:
    """Refuse a folder that exists as something else, or below which nothing can be written; make nothing.

    Raises:
        UserError: Names the path.
    """
    nearest = directory
    while not nearest.exists() and nearest != nearest.parent:
        nearest = nearest.parent
    if not nearest.is_dir():
        raise UserError(f"cannot make the folder '{directory}': '{nearest}' is a file")
    # What the kernel shows as files lets root write anywhere, and makes nothing.
    virtual = nearest.is_relative_to("/proc") or nearest.is_relative_to("/sys")
    if virtual or not os.access(nearest, os.W_OK | os.X_OK):
        raise UserError(f"cannot make the folder '{directory}': '{nearest}' cannot be written to")


def check_free(output: Path) -> None:
    """Refuse an output that exists, or that no folder can be made for; make nothing.

    Raises:
        UserError: Names the output.
    """
    if output.exists():
        raise UserError(f"'{output}' exists already; name a folder that does not, or remove it")
    check_can_be_made(output.parent)


@contextmanager
def locked(output: Path) -> Iterator[None]:
    """Keep other processes from writing an output, until the context ends or this process does, however it ends.

    The lock is a file ``.NAME.lock`` beside the output, which rank 0 takes for all ranks.

    Raises:
        UserError: Another process writes the output.
    """
    if not is_main_process():
        yield
        return
    output.parent.mkdir(parents=True, exist_ok=True)
    path = output.with_name(f".{output.name}.lock")
    # Not flock: a helper that was forked meanwhile would hold the lock as long as it lives.
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.truncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())
    except OSError as error:
        holder = os.read(descriptor, 200).decode(errors="replace") or "another process"
        os.close(descriptor)
        if error.errno in (errno.EACCES, errno.EAGAIN):  # another process has the lock
            raise UserError(f"'{output}' is being written by {holder}; wait for it, or name another output") from None
        warn(f"'{output}' cannot be locked ({error.strerror}): start it only once at a time")
        yield
        return
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)


def sha256_of(path: Path) -> str:
    """Return the SHA-256, in hexadecimal, of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Wait until the content of a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_atomic(draft: Path, path: Path) -> None:
    """Give a finished file its name, in the same file system, after its content has reached the disk."""
    sync(draft)
    draft.replace(path)


def write_atomic(path: Path, text: str) -> Path:
    """Write ``text`` as UTF-8; on any failure an older file stays."""
    with atomic_file(path) as draft:
        draft.write_text(text, encoding="utf-8", newline="\n")
    return path


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a name beside ``path`` for a file that takes its place when it is complete and on the disk."""
    # Not tempfile: its files are private (0600), and a rename would keep that.
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield draft
        replace_atomic(draft, path)
    finally:
        draft.unlink(missing_ok=True)


@contextmanager
def atomic_directory(output: Path) -> Iterator[Path]:
    """Yield a folder to write into that becomes ``output`` on success and vanishes on failure.

    All ranks enter and leave it; one that fails takes the folder with it, so that the others cannot finish.

    Raises:
        UserError: The output exists, another process writes it, the disk is full, or it cannot be written to.
    """
    check_free(output)
    partial = output.with_name(f".{output.name}.partial")
    barrier()
    with locked(output):
        if is_main_process():
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        barrier()
        try:
            yield partial
            barrier()
            if is_main_process():
                for path in (*partial.rglob("*"), partial):
                    sync(path)
                partial.rename(output)
                sync(output.parent)
            barrier()
        except BaseException as error:
            shutil.rmtree(partial, ignore_errors=True)
            if isinstance(error, OSError):
                raise UserError(f"cannot write '{output}': {error.strerror or error}") from None
            raise


class LineLog:
    """Lines that are written as they are made; a context manager that closes the file.

    Args:
        path: The file, which may be there already; None to write nothing.
    """

    def __init__(self, path: Path | None) -> None:
        self._file = None if path is None else path.open("ab+")
        if self._file is not None and self._file.tell():
            self._file.seek(-1, os.SEEK_END)
            if self._file.read() != b"\n":
                self.write([""])  # a line that was cut short keeps to itself

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if self._file is not None:
            self._file.close()

    def write(self, lines: Iterable[str]) -> None:
        """Append lines, which have no ends yet."""
        if self._file is not None:
            self._file.writelines(f"{line}\n".encode() for line in lines)
            self._file.flush()
