"""Follow a run from start to start: its progress, and its name at Weights & Biases."""

import contextlib
import json
import os
import secrets
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from nemodiff_train.distributed import is_main_process
from nemodiff_train.errors import RunStopped, UserError
from nemodiff_train.files import write_atomic
from nemodiff_train.model.checkpoint import Checkpoint

COMPLETED, TOLD_TO_END, KILLED = "completed", "told to end", "killed"
_KEPT = 50


@contextlib.contextmanager
def counted_start(output: Path, limit: int) -> Iterator[Callable[[str], None]]:
    """Record a start of the run, and how it ends, in ``restarts.json`` on rank 0.

    Args:
        output: Folder of the run.
        limit: Maximum number of consecutive starts that end without a new checkpoint; 0 for any number.

    Yields:
        A function that records how the start ends, for code that ends the process itself.

    Raises:
        RunStopped: The last starts made no progress.
    """
    if not is_main_process():
        yield lambda ending: None
        return
    file = output / "restarts.json"
    starts, step = _read(file), _saved_step(output / "checkpoints")
    _refuse_without_progress(file, starts, step, limit)
    starts = [*starts[1 - _KEPT :], {"step": step, "time": time.time(), "ended": KILLED}]

    def end(how: str) -> None:
        starts[-1]["ended"] = how
        write_atomic(file, json.dumps(starts, indent=1) + "\n")

    output.mkdir(parents=True, exist_ok=True)
    end(KILLED)
    try:
        yield end
    except SystemExit as leaving:
        end(f"exit code {leaving.code}" if leaving.code else TOLD_TO_END)
        raise
    except BaseException as error:
        end(str(error).strip().partition("\n")[0] or type(error).__name__)
        raise
    end(COMPLETED)


def _read(file: Path) -> list[dict[str, Any]]:
    try:
        starts = json.loads(file.read_text())
    except (OSError, ValueError):
        return []
    return starts if isinstance(starts, list) else []


def _saved_step(folder: Path) -> int:
    """Return the step from which the run would continue."""
    try:
        checkpoint = Checkpoint.find(folder)
    except UserError:
        return 0
    return checkpoint.step if checkpoint else 0


def _refuse_without_progress(file: Path, starts: list[dict[str, Any]], step: int, limit: int) -> None:
    without = 0
    for start in reversed(starts):
        if start["step"] != step or start["ended"] in (COMPLETED, TOLD_TO_END):
            break
        without += 1
    if limit and without >= limit:
        raise RunStopped(
            f"the last {without} starts went on from step {step} and ended without a new checkpoint, the last with: "
            f"{starts[-1]['ended']}. Remove the cause, then '{file}'"
        )


@contextlib.contextmanager
def same_wandb_run(output: Path) -> Iterator[None]:
    """Continue one run at Weights & Biases in every start, unless the environment names another."""
    if os.environ.get("WANDB_RUN_ID"):
        yield
        return
    file = output / "wandb_run_id"
    if is_main_process() and not file.exists():
        output.mkdir(parents=True, exist_ok=True)
        write_atomic(file, secrets.token_hex(4))
    variables = {"WANDB_RUN_ID": _wait_for(file), "WANDB_RESUME": os.environ.get("WANDB_RESUME", "allow")}
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def _wait_for(file: Path, seconds: float = 60.0) -> str:
    """Return the text of a file that rank 0 writes."""
    end = time.monotonic() + seconds
    while not file.exists() and time.monotonic() < end:
        time.sleep(0.05)
    return file.read_text()
