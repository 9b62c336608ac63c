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
_LAST_WORDS = 3.0
"""Seconds that the other ranks have after one has failed, which may be about to say why as well."""
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
    """Return the exit code of the first rank that fails, soon after it has, or 0 when all have ended well."""
    while True:
        codes = [rank.poll() for rank in ranks]
        if failed := [code for code in codes if code]:
            end = time.monotonic() + _LAST_WORDS
            while time.monotonic() < end and any(rank.poll() is None for rank in ranks):
                time.sleep(_POLL)
            return failed[0]
        if None not in codes:
            return 0
        time.sleep(_POLL)


def follow_parent() -> None:
    """End this helper process when its parent has ended, even by SIGKILL; it would wait for work for ever.

    Helpers are processes of :mod:`multiprocessing`.  What is sent to the process group of the parent, by a terminal
    or a launcher, does not reach a helper: the parent decides what becomes of its work.
    """
    parent = parent_process()
    assert parent is not None

    def exit_with_parent() -> None:
        parent.join()
        os._exit(1)

    os.setpgid(0, 0)
    threading.Thread(target=exit_with_parent, daemon=True).start()


def serve_parent_alone() -> None:
    """Follow the parent, and let the signals that tell a training to end be for it alone.

    A scheduler sends them to every process of a step, helpers that write its last checkpoint included.
    """
    follow_parent()
    for number in ENDING:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDING)  # of helpers_held()


@contextlib.contextmanager
def helpers_held() -> Iterator[None]:
    """Hold the signals back in what this thread starts, which may call :func:`serve_parent_alone` seconds later.

    A signal to this process is taken by another thread, or when the block ends.
    """
    resource_tracker.ensure_running()  # it would lift the mask when a helper is started
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def program_unseen() -> Iterator[None]:
    """Let processes that are spawned meanwhile not run this process's program as a module, as they do by default."""
    program = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = program
