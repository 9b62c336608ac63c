"""A run that stands still or is told to end: signals, stacks, and a status for others to read."""

import faulthandler
import json
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron.bridge.training.callbacks import Callback, CallbackContext

from nemodiff_train.config.run import ResilienceConfig
from nemodiff_train.distributed import global_rank
from nemodiff_train.files import write_atomic

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
_BEAT = 5.0  # seconds between status files
_TICK = 0.2


class Watchdog(Callback):
    """Watches the run from a thread of its own, which a collective that hangs does not hold up.

    After SIGTERM or SIGUSR1 Bridge saves at the end of the step and exits with 0; the watch gives it
    ``resilience.exit_grace`` seconds.  After ``resilience.hang_timeout`` seconds without progress it writes the
    stacks of all threads to ``stacks/rank_K.txt`` and ends the process with 1.  On rank 0 it writes ``status.json``:
    ``step``, ``phase``, ``seconds`` in it, ``time`` (Unix), ``seconds per step`` and the figures of
    :class:`~nemodiff_train.resilience.stragglers.StragglerMonitor`.

    A context manager: the thread runs while it is open.

    Args:
        output: The run's folder.
        settings: Limits.
        on_exit: Told the reason before the process is ended.
    """

    def __init__(self, output: Path, settings: ResilienceConfig, on_exit: Callable[[str], None]) -> None:
        self.output = output
        self.settings = settings
        self.on_exit = on_exit
        self.rank = global_rank()
        self.figures: dict[str, float] = {}
        self.step = 0
        self.phase, self.since, self.alive = "setup", time.monotonic(), time.monotonic()
        self.seconds_per_step = 0.0
        self.leave_by: float | None = None
        self.closed = threading.Event()
        self.handlers: dict[int, Any] = {}

    def __enter__(self) -> "Watchdog":
        # Python runs its handlers between two instructions of the main thread, so never while a collective hangs; the
        # number of a signal goes into a pipe at once.
        self.pipe, written = os.pipe()
        os.set_blocking(self.pipe, False)
        os.set_blocking(written, False)
        self.before = signal.set_wakeup_fd(written, warn_on_full_buffer=False)
        self.written = written
        self.thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.closed.set()
        self.thread.join()
        signal.set_wakeup_fd(self.before)
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        for descriptor in (self.pipe, self.written):
            os.close(descriptor)

    def on_train_start(self, context: CallbackContext) -> None:
        self.step = context.state.train_state.step
        bridges = signal.getsignal(signal.SIGUSR1)  # train.exit_signal; Bridge listens to one
        self.handlers = {signal.SIGTERM: signal.signal(signal.SIGTERM, bridges)}
        self._enter("after a step")

    def on_train_step_start(self, context: CallbackContext) -> None:
        self._enter("step")

    def on_train_step_end(self, context: CallbackContext) -> None:
        self.step = context.state.train_state.step + 1
        self.seconds_per_step = time.monotonic() - self.since
        self._enter("after a step")

    def on_eval_start(self, context: CallbackContext) -> None:
        self._enter("validation")

    def on_eval_step_end(self, context: CallbackContext) -> None:
        self.alive = time.monotonic()

    def on_checkpoint_save(self, context: CallbackContext) -> None:
        self.alive = time.monotonic()

    def _enter(self, phase: str) -> None:
        self.phase = phase
        self.since = self.alive = time.monotonic()

    def _run(self) -> None:
        beaten = 0.0
        while not self.closed.is_set():
            now = time.monotonic()
            if select.select([self.pipe], [], [], _TICK)[0] and set(os.read(self.pipe, 64)) & set(SIGNALS):
                self.leave_by = self.leave_by or now + self.settings.exit_grace
            if self.leave_by and now > self.leave_by:
                self._leave(f"not ended {self.settings.exit_grace:g} s after the signal")
            limit = self.settings.hang_timeout
            if limit and self.phase != "setup" and now - self.alive > limit:
                self._leave(f"no progress for {limit:g} s")
            if self.rank == 0 and now - beaten > _BEAT:
                beaten = now
                self._tell()
        if self.rank == 0:
            self.phase = "ended"
            self._tell()

    def _tell(self) -> None:
        status = {
            "step": self.step,
            "phase": self.phase,
            "seconds": round(time.monotonic() - self.since, 3),
            "time": time.time(),
            "seconds per step": self.seconds_per_step,
            **self.figures,
        }
        try:
            self.output.mkdir(parents=True, exist_ok=True)
            write_atomic(self.output / "status.json", json.dumps(status, indent=1) + "\n")
        except OSError:
            pass  # a full disk is for the checkpoint to tell

    def _leave(self, reason: str) -> None:
        """Write where every thread stands, and end: nothing else in the process can be relied on."""
        line = f"rank {self.rank}: {reason}, in step {self.step + 1} ({self.phase})"
        file = self.output / "stacks" / f"rank_{self.rank}.txt"
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            with file.open("w") as stream:
                print(f"{line}, at {time.strftime('%Y-%m-%d %H:%M:%S')}", file=stream, flush=True)
                faulthandler.dump_traceback(stream, all_threads=True)
            self.on_exit(line)
        finally:
            print(f"nemodiff: {line}; its stacks are in {file}", file=sys.__stderr__, flush=True)
            os._exit(1)
