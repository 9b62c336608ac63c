"""Faults at chosen moments of a training that otherwise runs as on the command line."""

import errno
import importlib
import multiprocessing
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from tools.support import small

HANGS = "a rank hangs from here on"
"""Printed by the rank that hangs."""
RECIPE = "from tools.support.small import recipe\n"


def furnish(folder: str | Path) -> None:
    """Write a model, data and a recipe into a folder."""
    folder = Path(folder)
    small.qwen3(folder / "qwen3", num_hidden_layers=2, hidden_size=32, intermediate_size=64)
    small.data(folder / "data")
    (folder / "small_recipe.py").write_text(RECIPE)


def words(folder: Path, output: Path, steps: int, interval: int, kept: int) -> list[str]:
    """Return the arguments of ``nemodiff train`` for a run.

    Args:
        folder: Folder that :func:`furnish` has filled.
        output: Folder of the run.
        steps: Number of steps.
        interval: Steps between checkpoints.
        kept: Number of newest checkpoints that are kept.
    """
    return [
        str(folder / "small_recipe.py"),
        f"start_from={folder / 'qwen3'}",
        f"data={folder / 'data'}",
        f"output={output}",
        "dataset.seq_length=32",
        f"train.train_iters={steps}",
        f"checkpoint.save_interval={interval}",
        f"checkpoint.most_recent_k={kept}",
    ]


def train(words: list[str], fault: str = "", rank: int = 0, step: int = 0) -> None:
    """Run ``nemodiff train`` with a fault, and exit with its code.

    Args:
        words: Arguments of ``nemodiff train``.
        fault: Key of ``FAULTS``, or empty.
        rank: Rank on which it happens.
        step: Step in which, or in the save after which, it happens.
    """
    from nemodiff_train.cli import main

    if fault and int(os.environ["RANK"]) == rank:
        FAULTS[fault](step)
    sys.exit(main(["train", *words]))


def _die(*arguments: Any, **named: Any) -> None:
    """Kill this rank, from itself or from a process that writes for it and has to end by itself."""
    rank = multiprocessing.parent_process()
    os.kill(os.getpid() if rank is None else rank.pid or 0, signal.SIGKILL)
    time.sleep(3600)


def _die_before(module: str, name: str, step: int) -> None:
    """Die instead of calling a module's function for the checkpoint of one step, which an argument names."""
    owner = importlib.import_module(module)
    plain = getattr(owner, name)

    def replaced(*arguments: Any, **named: Any) -> Any:
        due = any(f"iter_{step:07d}" in str(argument) for argument in arguments)
        return (_die if due else plain)(*arguments, **named)

    setattr(owner, name, replaced)


def _mid_shard(step: int) -> None:
    """Die when half of a shard is on the disk."""

    def truncate(name: str) -> None:
        os.truncate(name, os.stat(name).st_size // 2)
        _die()

    _when_a_shard_is_written(step, truncate)


def _full_disk(step: int) -> None:
    """Fail to write a shard with the error of a full disk."""

    def fail(name: str) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), name)

    _when_a_shard_is_written(step, fail)


def _no_writer(step: int) -> None:
    """Kill the process that writes, as one that takes too much memory is killed."""
    _when_a_shard_is_written(step, lambda name: os.kill(os.getpid(), signal.SIGKILL))


def _when_a_shard_is_written(step: int, call: Callable[[str], None]) -> None:
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    plain = filesystem_async.os.fsync

    def fsync(descriptor: int) -> None:
        plain(descriptor)
        name = os.readlink(f"/proc/self/fd/{descriptor}")
        if name.endswith(".distcp") and f"iter_{step:07d}" in name:
            call(name)

    filesystem_async.os.fsync = fsync


def _before_cleanup(step: int) -> None:
    from nemodiff_train.resilience import checkpoints

    plain = checkpoints.prune

    def prune(folder: Path, keep_last: int, keep_every: int) -> None:
        if (folder / f"iter_{step:07d}").exists():
            _die()
        plain(folder, keep_last, keep_every)

    checkpoints.prune = prune


def _mid_cleanup(step: int) -> None:
    """Die when an older checkpoint is half removed."""
    plain: Any = shutil.rmtree

    def rmtree(path: Path, *arguments: Any, **named: Any) -> None:
        if Path(path).name == f"iter_{step:07d}" and Path(path).exists():
            (Path(path) / "train_state.pt").unlink()
            _die()
        plain(path, *arguments, **named)

    setattr(shutil, "rmtree", rmtree)  # noqa: B010


def _in_step(call: Callable[[Any], None], step: int) -> None:
    """Call a function with the model after the last backward pass of a step."""
    from nemodiff_train.resilience.gradient_guard import GradientGuard
    from nemodiff_train.runtime.patches import before_gradient_reduction

    plain = GradientGuard.on_train_start

    def on_train_start(self: GradientGuard, context: Any) -> None:
        plain(self, context)

        def look() -> None:
            if context.state.train_state.step + 1 == step:
                call(context.model)

        before_gradient_reduction(context.model, look)

    setattr(GradientGuard, "on_train_start", on_train_start)  # noqa: B010


def _nan(model: Any) -> None:
    model[0].buffers[0].grad_data[7] = float("nan")


def _spike(model: Any) -> None:
    for buffer in model[0].buffers:
        buffer.grad_data.mul_(1e3)


def _spike_while_saving(step: int) -> None:
    """Let the checkpoint of two steps before still be written in the background when the spike comes."""
    _when_a_shard_is_written(step - 2, lambda name: time.sleep(3))
    _in_step(_spike, step)


def _hang(*arguments: Any) -> None:
    print(HANGS, file=sys.__stderr__, flush=True)
    time.sleep(3600)


def _hang_in_setup(step: int) -> None:
    from nemodiff_train.training.callbacks.run_log import RunLog

    setattr(RunLog, "on_data_init_start", _hang)  # noqa: B010


def _told_at_the_last_moment(step: int) -> None:
    from nemodiff_train.resilience.watchdog import Watchdog

    start = Watchdog.on_train_start

    def on_train_start(self: Watchdog, context: Any) -> None:
        print(HANGS, file=sys.__stderr__, flush=True)
        time.sleep(1)
        os.kill(os.getpid(), signal.SIGTERM)
        start(self, context)

    setattr(Watchdog, "on_train_start", on_train_start)  # noqa: B010


def _no_folder(step: int) -> None:
    from nemodiff_train.resilience.watchdog import Watchdog

    end = Watchdog.on_train_step_end

    def on_train_step_end(self: Watchdog, context: Any) -> None:
        end(self, context)
        if self.step_context.step == step:
            shutil.rmtree(self.step_context.output)

    setattr(Watchdog, "on_train_step_end", on_train_step_end)  # noqa: B010


def _crash(model: Any) -> None:
    raise RuntimeError("out of luck")


def _flip(model: Any) -> None:
    weight = next(p for n, p in model[0].named_parameters() if n.endswith("final_layernorm.weight"))
    weight.data.view(torch.int32)[3] ^= 1


CHECKPOINTS = "nemodiff_train.resilience.checkpoints"

FAULTS: dict[str, Callable[[int], None]] = {
    "before shard": partial(_die_before, "megatron.core.dist_checkpointing", "save"),
    "mid-shard": _mid_shard,
    "full disk": _full_disk,
    "no writer": _no_writer,
    "before manifest": partial(_die_before, CHECKPOINTS, "write_checksums"),
    "before publication": partial(_die_before, CHECKPOINTS, "remove_mark"),
    "before tracker": partial(_die_before, CHECKPOINTS, "write_trackers"),
    "before cleanup": _before_cleanup,
    "mid-cleanup": _mid_cleanup,
    "nan": partial(_in_step, _nan),
    "spike": partial(_in_step, _spike),
    "spike while saving": _spike_while_saving,
    "hang": partial(_in_step, _hang),
    "hang in set-up": _hang_in_setup,
    "no folder": _no_folder,
    "told at the last moment": _told_at_the_last_moment,
    "crash": partial(_in_step, _crash),
    "flip": partial(_in_step, _flip),
}
