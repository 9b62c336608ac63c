"""Record the starts of a run, refuse to repeat one without progress, and keep its name at Weights & Biases."""

import contextlib
import json
import os
import secrets
import time
from collections.abc import Callable, Iterator
from itertools import takewhile
from pathlib import Path
from typing import TypedDict

from pydantic import TypeAdapter

from nemodiff_train.distributed import is_main_process
from nemodiff_train.errors import RunStopped
from nemodiff_train.files import write_atomic
from nemodiff_train.model.checkpoint import Checkpoint
from nemodiff_train.signals import TerminatedBeforeFirstStep

COMPLETED, TERMINATED, KILLED = "completed", "terminated", "killed"
_RECORDED = 50
"""Maximum number of starts in ``restarts.json``."""


class Start(TypedDict):
    """One start of a run."""

    step: int
    """Step of the checkpoint that it resumed from."""
    time: float
    """Unix time."""
    ended: str
    """How it ended: a constant above, an exit code, or the first line of an error."""


_STARTS = TypeAdapter(list[Start])


@contextlib.contextmanager
def record_start(output: Path, limit: int) -> Iterator[Callable[[str], None]]:
    """Record a start of the run in ``restarts.json``, and how it ends, from rank 0.

    Args:
        output: Folder of the run.
        limit: Maximum number of consecutive starts without a new checkpoint; 0 for no limit.

    Yields:
        A function that records how the start ends, for code that ends the process itself.

    Raises:
        RunStopped: The last starts made no progress; nothing is started.
    """
    if not is_main_process():
        yield lambda ending: None
        return
    file = output / "restarts.json"
    try:
        starts = _STARTS.validate_json(file.read_bytes())
    except (OSError, ValueError):  # missing, or not what this module has written
        starts = []
    saved = Checkpoint.to_resume(output / "checkpoints", None)  # whichever this start resumes from
    step = saved.step if saved else 0

    def is_stuck(start: Start) -> bool:
        return start["step"] == step and start["ended"] not in (COMPLETED, TERMINATED)

    stuck = list(takewhile(is_stuck, reversed(starts)))
    if limit and len(stuck) >= limit:
        raise RunStopped(
            f"the last {len(stuck)} starts resumed from step {step} and ended without a new checkpoint, the last "
            f"with: {stuck[0]['ended']}. Remove the cause, then '{file}'"
        )
    starts = [*starts[1 - _RECORDED :], {"step": step, "time": time.time(), "ended": KILLED}]

    def end(how: str) -> None:
        starts[-1]["ended"] = how
        write_atomic(file, json.dumps(starts, indent=1) + "\n")

    output.mkdir(parents=True, exist_ok=True)
    end(KILLED)
    try:
        yield end
    except SystemExit as leaving:
        failed = leaving.code and not isinstance(leaving, TerminatedBeforeFirstStep)
        end(f"exit code {leaving.code}" if failed else TERMINATED)
        raise
    except BaseException as error:
        end(str(error).strip().partition("\n")[0] or type(error).__name__)
        raise
    end(COMPLETED)


@contextlib.contextmanager
def keep_wandb_run(output: Path) -> Iterator[None]:
    """Let every start of a run continue one run at Weights & Biases, unless the environment names another."""
    if os.environ.get("WANDB_RUN_ID"):
        yield
        return
    file = output / "wandb_run_id"
    if is_main_process() and not file.exists():
        output.mkdir(parents=True, exist_ok=True)
        write_atomic(file, secrets.token_hex(4))
    end = time.monotonic() + 60
    while not file.exists() and time.monotonic() < end:  # until rank 0 has written it
        time.sleep(0.05)
    added = {"WANDB_RUN_ID": file.read_text()}
    if "WANDB_RESUME" not in os.environ:
        added["WANDB_RESUME"] = "allow"
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:  # another run of this process is another one there
            os.environ.pop(name, None)
