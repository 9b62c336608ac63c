"""Start processes that end together: the ranks of one machine, and the helpers of a rank."""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from multiprocessing import parent_process, resource_tracker
from types import FrameType, ModuleType

import psutil

from nemodiff_train.distributed import ReservedPort
from nemodiff_train.errors import UserError

ENDING = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
"""Signals to end a training: from a scheduler, from ``slurm/train.sbatch`` before the time limit, and Ctrl-C."""
_FAILURE_GRACE = 3.0
"""Seconds that the other ranks have to exit after one has failed; they may be about to print why as well."""
_LEAST_MEMORY = 200e6
"""Bytes that a rank or a worker takes at the least: what it imports."""
_POLL = 0.05
"""Seconds between looks at the ranks."""


def check_processes(option: str, count: int) -> None:
    """Refuse more processes than this machine's memory holds.

    Args:
        option: What asks for them, for the message.
        count: Number of them.

    Raises:
        UserError: There are none, or they would take more memory than there is.
    """
    if count < 1:
        raise UserError(f"{option} is {count}; it must be at least 1")
    memory = psutil.virtual_memory().total
    if count * _LEAST_MEMORY > memory:
        raise UserError(
            f"{option} {count}: these processes take {count * _LEAST_MEMORY / 1e9:,.0f} GB of memory or more; this "
            f"machine has {memory / 1e9:,.0f}; use fewer"
        )


def run_ranks(command: Sequence[str], count: int) -> int:
    """Run a command as several ranks of this machine, in the environment that torchrun gives to ranks.

    SIGTERM and SIGUSR1 are passed on to the ranks; Ctrl-C reaches them from the terminal.  When a rank has failed,
    the others are ended.  When this process is killed, so are they.

    Args:
        command: Program and arguments.
        count: Number of ranks.

    Returns:
        The exit code of the first rank that failed, negative for a signal; 0 if none did.
    """
    port = ReservedPort()
    shared = {
        "OMP_NUM_THREADS": "1",
        **os.environ,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port.number),
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
    }
    ranks: list[subprocess.Popen[bytes]] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        for rank in ranks:
            rank.send_signal(number)

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGTERM, signal.SIGUSR1)}
    before[signal.SIGINT] = signal.signal(signal.SIGINT, lambda number, frame: None)
    try:
        for index in range(count):
            environment = {**shared, "RANK": str(index), "LOCAL_RANK": str(index)}
            ranks.append(subprocess.Popen(command, env=environment, preexec_fn=_end_with_parent))
        return _wait(ranks)
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
        for number, handler in before.items():
            signal.signal(number, handler)


def _end_with_parent() -> None:
    """Run between fork and exec: ask the kernel to kill this process when its parent ends."""
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


def _wait(ranks: Sequence["subprocess.Popen[bytes]"]) -> int:
    """Return the exit code of the first rank that fails, soon after it has, or 0 when all have succeeded."""
    while True:
        codes = [rank.poll() for rank in ranks]
        if failed := [code for code in codes if code]:
            end = time.monotonic() + _FAILURE_GRACE
            while time.monotonic() < end and any(rank.poll() is None for rank in ranks):
                time.sleep(_POLL)
            return failed[0]
        if None not in codes:
            return 0
        time.sleep(_POLL)


def exit_with_parent() -> None:
    """Exit as soon as the parent of this helper process has exited, even by SIGKILL; it would wait for work for ever.

    Helpers are processes of :mod:`multiprocessing`.  What is sent to the process group of the parent, by a terminal
    or a launcher, does not reach a helper: the parent decides what becomes of its work.
    """
    parent = parent_process()
    assert parent is not None

    def end_after_parent() -> None:
        parent.join()
        os._exit(1)

    os.setpgid(0, 0)
    threading.Thread(target=end_after_parent, daemon=True).start()


def exit_only_with_parent() -> None:
    """Exit with the parent, and ignore the signals to end a training, which are for the parent alone.

    A scheduler sends them to every process of a step, helpers that write its last checkpoint included.
    """
    exit_with_parent()
    for number in ENDING:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDING)  # which signals_blocked() has blocked


@contextlib.contextmanager
def signals_blocked() -> Iterator[None]:
    """Block the signals to end a training in processes that this thread starts.

    Such a process may call :func:`exit_only_with_parent` seconds later.  A signal to this process is taken by another
    thread, or when the ``with`` block ends.
    """
    resource_tracker.ensure_running()  # it would lift the mask when a helper is started
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def without_main_module() -> Iterator[None]:
    """Hide ``__main__``, so that processes spawned meanwhile do not import this program, as they do by default."""
    program = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = program
