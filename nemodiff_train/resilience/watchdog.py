"""Watch a run that hangs or is terminated: signals, stacks, and a status file for monitoring."""

import faulthandler
import json
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import NoReturn

from megatron.bridge.training.callbacks import Callback, CallbackContext

from nemodiff_train.config.context import StepContext
from nemodiff_train.config.run import ResilienceConfig
from nemodiff_train.distributed import barrier, global_rank
from nemodiff_train.files import write_atomic
from nemodiff_train.processes import ENDING
from nemodiff_train.resilience.restarts import TERMINATED
from nemodiff_train.signals import INTERRUPTED, TerminatedBeforeFirstStep, announce, code_after

_STATUS_INTERVAL = 5.0
"""Seconds between status files."""
_POLL_INTERVAL = 0.2
"""Seconds that the thread waits for a signal at a time."""
_LAST_WORDS = 1.0
"""Seconds that the other ranks have to write their stacks: a launcher ends them after the first."""
_SETUP_GRACE = 0.5
"""Seconds after a signal before the first step: there is nothing to save, but a collective may be waiting."""


class Watchdog(Callback):
    """Watch the run from a separate thread, which a hanging collective does not block.

    Bridge saves at the end of the step after a signal and exits with 0; the watchdog ends a process that does not
    get there within ``resilience.exit_grace`` seconds, or that makes no progress, and writes its stacks before.
    docs/training.md describes the files.

    A context manager: the thread runs while it is open.

    Args:
        step_context: The run's folder and step, and what the status says of its ranks.
        settings: Limits.
        on_exit: Called with the reason before the process is ended.
    """

    def __init__(self, step_context: StepContext, settings: ResilienceConfig, on_exit: Callable[[str], None]) -> None:
        self.step_context = step_context
        self.settings = settings
        self.on_exit = on_exit
        self.rank = global_rank()
        self.phase = "setup"
        self.phase_started = self.last_progress = time.monotonic()
        self.seconds_per_step = 0.0
        self.signalled_at: float | None = None
        self.ending_signal = 0
        """The first signal that told the run to end."""
        self.closed = threading.Event()
        self.handlers: dict[int, Callable[[int, FrameType | None], object] | int | None] = {}
        """Signal handlers to restore at the end."""

    def __enter__(self) -> "Watchdog":
        # Python runs signal handlers between two instructions of the main thread, so never while a collective hangs;
        # the number of a signal is written to a pipe at once.
        self.pipe, self.pipe_end = os.pipe()
        os.set_blocking(self.pipe, False)
        os.set_blocking(self.pipe_end, False)
        self.wakeup_before = signal.set_wakeup_fd(self.pipe_end, warn_on_full_buffer=False)
        self.thread = threading.Thread(target=self._run, name="watchdog", daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.closed.set()
        self.thread.join()
        signal.set_wakeup_fd(self.wakeup_before)
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        for descriptor in (self.pipe, self.pipe_end):
            os.close(descriptor)

    def on_train_start(self, context: CallbackContext) -> None:
        self.step_context.step = context.state.train_state.step
        # Bridge listens to one signal, train.exit_signal; its handler takes the others too.
        bridge_handler = signal.getsignal(signal.SIGUSR1)
        self.handlers = {number: signal.signal(number, bridge_handler) for number in ENDING}
        try:
            barrier()  # no rank may still end as in set-up when another is in a step
        except RuntimeError:
            time.sleep(_SETUP_GRACE)  # for the signal that the other has followed
            if not self.ending_signal:
                raise
            announce(self.ending_signal)
            raise TerminatedBeforeFirstStep(code_after(self.ending_signal)) from None
        self._enter("after a step")

    def on_train_step_start(self, context: CallbackContext) -> None:
        self._enter("step")

    def on_train_step_end(self, context: CallbackContext) -> None:
        self.step_context.step = context.state.train_state.step + 1
        self.seconds_per_step = time.monotonic() - self.phase_started
        self._enter("after a step")

    def on_eval_start(self, context: CallbackContext) -> None:
        self._enter("validation")

    def on_eval_step_end(self, context: CallbackContext) -> None:
        self.last_progress = time.monotonic()

    on_checkpoint_save = on_eval_step_end

    def _enter(self, phase: str) -> None:
        self.phase = phase
        self.phase_started = self.last_progress = time.monotonic()

    def _run(self) -> None:
        """Poll for signals, compare the limits, and write the status, until the watchdog is closed."""
        written = 0.0
        while not self.closed.is_set():
            if select.select([self.pipe], [], [], _POLL_INTERVAL)[0]:
                self._take_signals(os.read(self.pipe, 64))
            now = time.monotonic()
            in_setup = self.phase == "setup"
            grace = _SETUP_GRACE if in_setup else self.settings.exit_grace
            if self.signalled_at and now - self.signalled_at > grace:
                if in_setup:
                    announce(self.ending_signal)
                    self._end(TERMINATED, code_after(self.ending_signal))
                self._exit(f"not ended {grace:g} s after the signal")
            limit = self.settings.setup_timeout if in_setup else self.settings.hang_timeout
            if limit and now - self.last_progress > limit:
                self._exit(f"no progress for {limit:g} s")
            if self.rank == 0 and now - written > _STATUS_INTERVAL:
                written = now
                self._write_status()
        if self.rank == 0:
            self.phase = "ended"
            self._write_status()

    def _take_signals(self, numbers: bytes) -> None:
        """Start the time in which the run has to end; a second Ctrl-C ends the process at once."""
        ending_signals = [number for number in numbers if number in ENDING]
        if ending_signals and not self.signalled_at:
            self.signalled_at, self.ending_signal = time.monotonic(), ending_signals.pop(0)
            if self.ending_signal == signal.SIGINT and self.rank == 0 and self.phase != "setup":
                line = "nemodiff: ending after this step, which is saved; Ctrl-C again ends at once"
                print(line, file=sys.__stderr__, flush=True)
        if signal.SIGINT in ending_signals and self.phase != "setup":
            self._end("interrupted twice", INTERRUPTED)

    def _end(self, how: str, code: int) -> NoReturn:
        """Record how the run ends, and end the process: nothing else in it can be relied on."""
        try:
            self.on_exit(how)
        finally:
            os._exit(code)

    def _write_status(self) -> None:
        status = {
            "step": self.step_context.step,
            "phase": self.phase,
            "seconds": round(time.monotonic() - self.phase_started, 3),
            "time": time.time(),
            "seconds_per_step": self.seconds_per_step,
            **self.step_context.rank_figures,
        }
        try:
            self.step_context.output.mkdir(parents=True, exist_ok=True)
            write_atomic(self.step_context.output / "status.json", json.dumps(status, indent=1) + "\n")
        except OSError:
            pass  # the checkpoint reports a full disk

    def _exit(self, reason: str) -> NoReturn:
        """Write the stacks of all threads and end the process with 1."""
        line = f"rank {self.rank}: {reason}, in step {self.step_context.step + 1} ({self.phase})"
        file = self.step_context.output / "stacks" / f"rank_{self.rank}.txt"
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            with file.open("w") as stream:
                print(f"{line}, at {time.strftime('%Y-%m-%d %H:%M:%S')}", file=stream, flush=True)
                faulthandler.dump_traceback(stream, all_threads=True)
        finally:
            print(f"nemodiff: {line}; its stacks are in {file}", file=sys.__stderr__, flush=True)
            time.sleep(_LAST_WORDS)
            self._end(line, 1)
