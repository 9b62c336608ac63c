"""Checkpoints that are complete or invisible: Bridge saves and loads them, this publishes and chooses them."""

import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron.bridge.training.callbacks import CallbackManager
from megatron.bridge.training.checkpointing import (
    CheckpointSaveContext,
    DefaultCheckpointManager,
)
from megatron.bridge.training.config import CheckpointConfig
from megatron.bridge.training.state import GlobalState
from torch.distributed.checkpoint.api import CheckpointException

from nemodiff_train.console import console
from nemodiff_train.distributed import all_gather_object, barrier, global_rank
from nemodiff_train.errors import RunStopped, UserError, disk_is_full
from nemodiff_train.files import write_atomic
from nemodiff_train.model.checksums import (
    CHECKSUMS,
    content_damage,
    digests,
    files_of,
    iterations,
    mark_of,
    recorded,
    structure_damage,
)

MANAGER = f"{__name__}.WholeCheckpoints"
_ASIDE = "damaged-"
_TRACKED_STATE, _TRACKED_STEP = "latest_train_state.pt", "latest_checkpointed_iteration.txt"
_WRITERS = ("Worker failure", "PytorchStreamWriter failed", "inline_container.cc")
_TICK = 0.05  # seconds
_NEARLY_NOTHING = 1 << 20  # bytes; what is free on a disk that is called full


class WholeCheckpoints(DefaultCheckpointManager):
    """Bridge's checkpoint manager, made safe against a process that ends at any moment.

    A mark beside the folder says that a checkpoint is unfinished.  When all of it is on the disk, the checksums of
    its files are written into it, the mark goes, the trackers are replaced, and only then older ones are removed.
    """

    def __init__(self, checkpoint_config: CheckpointConfig) -> None:
        super().__init__(checkpoint_config)
        self.keep_last = checkpoint_config.most_recent_k
        self.saving: list[Path] = []
        """Checkpoints that are not published yet, in order."""
        # Here, since Bridge asks for the trackers next, and would start anew without them.
        if checkpoint_config.load is not None and Path(checkpoint_config.load).is_dir():
            latest_complete(Path(checkpoint_config.load), checkpoint_config.ckpt_step)

    def save(self, ctx: CheckpointSaveContext, callback_manager: CallbackManager | None) -> None:
        """Save and publish; an asynchronous save is published by :meth:`finalize_async_saves`.

        Raises:
            RunStopped: The disk is full, or cannot be written to.
        """
        if ctx.non_persistent_ckpt:
            super().save(ctx, callback_manager)
            return
        iteration = Path(str(self.checkpoint_config.save)) / f"iter_{ctx.state.train_state.step:07d}"
        self.finalize_async_saves(ctx.state, blocking=True)  # one at a time: a kill costs no more than one of them
        self.checkpoint_config.most_recent_k = -1  # Bridge would remove older ones before this one is published
        try:
            _begin(iteration)
            super().save(ctx, callback_manager)
            self.saving.append(iteration)
            self._publish_finished(ctx.state)
        except (Exception, CheckpointException) as error:
            if reason := _cannot_write(error, iteration.parent):
                raise _not_saved(iteration, error, reason) from error
            raise
        finally:
            self.checkpoint_config.most_recent_k = self.keep_last

    def finalize_async_saves(self, state: GlobalState, blocking: bool = False, terminate: bool = False) -> None:
        """Finish asynchronous saves that are done, and publish them.

        Raises:
            RunStopped: The disk is full, or cannot be written to, or the process that writes is gone.
        """
        self._check_writer(state)
        try:
            while blocking and _running(state):  # Megatron's own waiting does not look at the process
                super().finalize_async_saves(state)
                time.sleep(_TICK)
                self._check_writer(state)
            super().finalize_async_saves(state, blocking, terminate)
            self._publish_finished(state)
        except (Exception, CheckpointException) as error:
            if self.saving and (reason := _cannot_write(error, self.saving[0].parent)):
                raise _not_saved(self.saving[0], error, reason) from error
            raise

    def _check_writer(self, state: GlobalState) -> None:
        """Megatron would wait for ever for what a process that was killed has not written."""
        queue = state.async_calls_queue
        for call in queue.async_calls if queue is not None else ():
            writer = call.async_caller.process
            if writer is not None and not writer.is_alive():
                raise RunStopped(
                    f"the process that writes '{self.saving[0]}' on rank {global_rank()} is gone (exit code "
                    f"{writer.exitcode}); if its memory was short, set checkpoint.async_save=false, then repeat the "
                    "command",
                    alone=True,
                )

    def _publish_finished(self, state: GlobalState) -> None:
        while len(self.saving) > _running(state):
            iteration = self.saving.pop(0)
            publish(iteration)
            config: Any = state.cfg
            if global_rank() == 0:
                prune(iteration.parent, self.keep_last, config.resilience.keep_every)
        barrier()


def _running(state: GlobalState) -> int:
    """How many asynchronous saves have not been finished, the same on all ranks."""
    queue = state.async_calls_queue
    return int(queue.get_num_unfinalized_calls()) if queue is not None else 0


def _begin(iteration: Path) -> None:
    """Mark a checkpoint as unfinished before its first byte is written."""
    if global_rank() == 0:
        iteration.parent.mkdir(parents=True, exist_ok=True)
        mark_of(iteration).touch()
        _to_disk(iteration.parent)
        shutil.rmtree(iteration, ignore_errors=True)  # of the same step: a rollback trains it again
    barrier()


def publish(iteration: Path) -> None:
    """Make a saved checkpoint the newest: checksums, then the mark, then the trackers.  Every rank takes part."""
    names = all_gather_object(files_of(iteration) if global_rank() == 0 else None)[0]
    shares = all_gather_object(digests(iteration, names[global_rank() :: len(all_gather_object(None))], durable=True))
    if global_rank() == 0:
        write_checksums(iteration, {name: entry for share in shares for name, entry in share.items()})
        remove_mark(iteration)
        write_trackers(iteration)
    barrier()


def write_checksums(iteration: Path, entries: dict[str, dict[str, Any]]) -> None:
    """Say what the files of a checkpoint are."""
    write_atomic(iteration / CHECKSUMS, json.dumps(entries, indent=1, sort_keys=True) + "\n")
    _to_disk(iteration)


def remove_mark(iteration: Path) -> None:
    """Say that a checkpoint is complete."""
    mark_of(iteration).unlink(missing_ok=True)
    _to_disk(iteration.parent)


def write_trackers(iteration: Path) -> None:
    """Name a checkpoint as the one to load, in Bridge's two files; neither is ever half written."""
    folder, state = iteration.parent, iteration / "train_state.pt"
    if state.is_file():
        temporary = folder / f".{_TRACKED_STATE}.tmp"
        shutil.copyfile(state, temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(folder / _TRACKED_STATE)
    write_atomic(folder / _TRACKED_STEP, str(step_of(iteration)))
    _to_disk(folder)


def prune(folder: Path, keep_last: int, keep_every: int) -> None:
    """Remove older checkpoints.

    Args:
        folder: Of the checkpoints.
        keep_last: How many of the newest stay; below 1 for all.
        keep_every: Those of every so many steps stay as well; 0 for none.
    """
    published = [iteration for iteration in iterations(folder) if not mark_of(iteration).exists()]
    for iteration in published[keep_last:] if keep_last > 0 else []:
        if not keep_every or step_of(iteration) % keep_every:
            mark_of(iteration).touch()  # half removed is unfinished, not damaged
            shutil.rmtree(iteration)
            mark_of(iteration).unlink()


def step_of(iteration: Path) -> int:
    """The step of an ``iter_*`` folder."""
    return int(iteration.name.removeprefix("iter_"))


def latest_complete(folder: Path, step: int | None = None) -> Path | None:
    """Make the newest whole checkpoint the one that Bridge loads.  Every rank takes part in reading.

    What is unfinished or damaged is renamed ``damaged-iter_*``, and named in a line.

    Args:
        folder: Of the checkpoints.
        step: Take the one of this step and no other.

    Returns:
        The checkpoint, or None if the run has none yet.

    Raises:
        UserError: None is whole, and not all were merely unfinished; nothing is renamed then.
    """
    found = all_gather_object([str(one) for one in iterations(folder)] if global_rank() == 0 else None)[0]
    wanted = [Path(one) for one in found if step is None or step_of(Path(one)) == step]
    wrong: dict[Path, str] = {}
    whole = None
    for iteration in wanted:
        damage = _damage(iteration)
        if damage is None:
            whole = iteration
            break
        wrong[iteration] = damage
    unfinished = all_gather_object(
        [mark_of(iteration).exists() for iteration in wrong] if global_rank() == 0 else None
    )[0]
    if whole is None and not all(unfinished):
        raise _none_whole(folder, wrong)
    if whole is None and not wrong and (lost := _set_aside_before(folder)):
        raise UserError(f"of the checkpoints in '{folder}' only '{lost}' is left, which is damaged; {_WAY_OUT}")
    if global_rank() == 0:
        quarantine_damaged(folder, whole, wrong)
    barrier()
    return whole


_WAY_OUT = "put a copy in its place, or name another output to start anew"


def _none_whole(folder: Path, wrong: dict[Path, str]) -> UserError:
    named = ", ".join(f"'{iteration.name}': {damage}" for iteration, damage in wrong.items())
    return UserError(f"no checkpoint in '{folder}' is whole ({named}); {_WAY_OUT}")


def _set_aside_before(folder: Path) -> str:
    """A checkpoint that was complete once, was found damaged, and has no successor."""
    found = sorted(folder.glob(f"{_ASIDE}iter_*"))
    return next((aside.name for aside in reversed(found) if not mark_of(aside).exists()), "")


def _damage(iteration: Path) -> str | None:
    """What is wrong with a checkpoint; its bytes are read by all ranks, a share each."""
    seen = all_gather_object(structure_damage(iteration) if global_rank() == 0 else None)[0]
    if seen is not None:
        return str(seen)
    names = sorted(recorded(iteration))
    shares = all_gather_object(content_damage(iteration, names[global_rank() :: len(all_gather_object(None))]))
    return next((share for share in shares if share), None)


def quarantine_damaged(folder: Path, whole: Path | None, wrong: dict[Path, str]) -> None:
    """Put the files in order: nothing unfinished under a checkpoint's name, and trackers that name the chosen one."""
    for iteration, damage in wrong.items():
        aside = iteration.with_name(f"{_ASIDE}{iteration.name}")
        if aside.exists():
            shutil.rmtree(aside)
        iteration.rename(aside)
        if mark_of(iteration).exists():
            mark_of(iteration).rename(mark_of(aside))
        console.print(
            f"[yellow]checkpoint '{iteration}': {damage}; it is '{aside.name}' now[/yellow]", soft_wrap=True
        )
    for iteration in iterations(folder):
        if whole is not None and iteration < whole and mark_of(iteration).exists():
            shutil.rmtree(iteration)  # its removal had begun
    for mark in folder.glob(".iter_*.unfinished"):
        if not (folder / mark.name[1:].removesuffix(".unfinished")).exists():
            mark.unlink()
    if whole is not None:
        write_trackers(whole)
    elif wrong:
        for tracker in (_TRACKED_STATE, _TRACKED_STEP):
            (folder / tracker).unlink(missing_ok=True)
        console.print("[yellow]no checkpoint had been finished: the run starts from its beginning[/yellow]")


def causes_of(error: BaseException | None) -> Iterator[BaseException]:
    """An error and what it came from; Megatron's saving wraps what happened on each rank."""
    while error is not None:
        yield error
        for failure in getattr(error, "failures", {}).values():
            yield failure[0]
        error = error.__cause__ or error.__context__


def _cannot_write(error: BaseException, folder: Path) -> str:
    """What keeps a checkpoint from being written, or an empty string if the error is another."""
    if isinstance(error, CheckpointException) and global_rank() != 0:
        return "a file could not be written"  # the reason is with rank 0, which says it
    causes = list(causes_of(error))
    for cause in causes:
        if isinstance(cause, OSError) and not isinstance(cause, ConnectionError | TimeoutError):
            return "the disk is full" if disk_is_full(cause) else str(cause.strerror or cause).lower()
    if any(word in str(cause) for cause in causes for word in _WRITERS):  # they do not pass on the reason
        full = shutil.disk_usage(folder).free < _NEARLY_NOTHING
        return "the disk is full" if full else "a file could not be written, as on a full disk"
    return ""


def _not_saved(iteration: Path, error: BaseException, reason: str) -> RunStopped:
    together_known = isinstance(error, CheckpointException)  # all ranks raise it
    if global_rank() == 0 or not together_known:
        shutil.rmtree(iteration, ignore_errors=True)  # what fills the disk; the mark stays
    whole = [one.name for one in iterations(iteration.parent) if structure_damage(one) is None]
    last = f"'{whole[0]}' is intact" if whole else "there is none before it"
    return RunStopped(
        f"checkpoint '{iteration}' could not be saved: {reason} ({last}); make room and repeat the command",
        alone=not together_known,
    )


def _to_disk(folder: Path) -> None:
    """Wait until the names in a folder are on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
