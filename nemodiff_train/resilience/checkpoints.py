"""Make checkpoints complete or invisible: Bridge saves and loads them, this module publishes and selects them."""

import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

from megatron.bridge.training.callbacks import CallbackManager
from megatron.bridge.training.checkpointing import (
    CheckpointLoadContext,
    CheckpointSaveContext,
    DefaultCheckpointManager,
)
from megatron.bridge.training.config import CheckpointConfig
from megatron.bridge.training.state import GlobalState
from torch.distributed.checkpoint.api import CheckpointException

from nemodiff_train.config.context import config_of
from nemodiff_train.console import warn
from nemodiff_train.data.tokenizer_files import restore_tokenizer
from nemodiff_train.distributed import (
    all_gather_object,
    barrier,
    from_main_process,
    global_rank,
    is_main_process,
    world_size,
)
from nemodiff_train.errors import RunStopped, UserError, disk_is_full
from nemodiff_train.files import atomic_file, sync, write_atomic
from nemodiff_train.model.checkpoint import Checkpoint
from nemodiff_train.model.checksums import (
    content_damage,
    digests,
    files_of,
    iterations,
    mark_of,
    recorded,
    step_of,
    structure_damage,
    write_checksums,
)
from nemodiff_train.processes import signals_blocked

MANAGER = f"{__name__}.AtomicCheckpointManager"
"""The class below, as Bridge takes it."""

_QUARANTINE = "damaged-"  # before the name of a checkpoint that cannot be loaded
_TRACKED_STATE, _TRACKED_STEP = "latest_train_state.pt", "latest_checkpointed_iteration.txt"
_WRITER_ERRORS = ("Worker failure", "PytorchStreamWriter failed", "inline_container.cc")
_GROUP_SETTINGS = ("max_lr", "min_lr", "betas", "eps", "wd_mult", "lr_mult")
"""Settings in the optimizer's groups, which it would take from the checkpoint."""
_POLL = 0.05  # seconds between looks at a process that writes
_FULL = 1 << 20  # bytes that may be free on a disk that is called full


class AtomicCheckpointManager(DefaultCheckpointManager):
    """Bridge's checkpoint manager, made safe against a process that ends at any moment.

    A mark beside the folder says that a checkpoint is unfinished; :func:`publish` removes it.
    """

    current: "ClassVar[AtomicCheckpointManager]"
    """The manager of this process's run; Bridge makes it, and does not hand it to callbacks."""

    def __init__(self, checkpoint_config: CheckpointConfig) -> None:
        super().__init__(checkpoint_config)
        AtomicCheckpointManager.current = self
        self.keep_last = checkpoint_config.most_recent_k
        self.unpublished: list[Path] = []
        """Checkpoints that are not published yet, in order."""
        # Now, since Bridge asks for the trackers next, and would start anew without them.
        if checkpoint_config.load is not None and Path(checkpoint_config.load).is_dir():
            latest_complete(Path(checkpoint_config.load), checkpoint_config.ckpt_step)

    def load(self, ctx: CheckpointLoadContext) -> tuple[int, int]:
        """Load as Bridge does; the schedule and the optimizer's constants stay those of this start's settings."""
        if ctx.optimizer is None or ctx.opt_param_scheduler is None:
            return super().load(ctx)
        groups = ctx.optimizer.param_groups
        settings_of_groups = [{name: group[name] for name in _GROUP_SETTINGS if name in group} for group in groups]
        now = config_of(ctx.state)
        before = Checkpoint.to_resume(self.checkpoint_config.load, self.checkpoint_config.ckpt_step)
        # Megatron finds a group of the checkpoint by its learning rates.
        if before is not None and "optimizer" in before.run_config:
            for group in groups:
                for name, field in (("max_lr", "lr"), ("min_lr", "min_lr")):
                    if group.get(name) is not None and group[name] == getattr(now.optimizer, field):
                        group[name] = before.run_config["optimizer"][field]
        ctx.opt_param_scheduler.num_steps = 0  # loading adds to it
        loaded = super().load(ctx)
        for group, settings in zip(ctx.optimizer.param_groups, settings_of_groups, strict=True):
            group.update(settings)
        if ctx.state.train_state.step and before is not None:  # else the weights of a pretrained model alone
            # Megatron counts the steps of a schedule in samples.
            schedule, batch = ctx.opt_param_scheduler, int(before.run_config["train"]["global_batch_size"])
            schedule.num_steps = schedule.num_steps * now.train.global_batch_size // batch
            schedule.step(increment=0)
        return loaded

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
            if is_main_process():  # mark it as unfinished before its first byte is written
                iteration.parent.mkdir(parents=True, exist_ok=True)
                mark_of(iteration).touch()
                sync(iteration.parent)
                shutil.rmtree(iteration, ignore_errors=True)  # of the same step: a rollback trains it again
            barrier()
            with signals_blocked():
                super().save(ctx, callback_manager)
            self.unpublished.append(iteration)
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
                time.sleep(_POLL)
                self._check_writer(state)
            super().finalize_async_saves(state, blocking, terminate)
            self._publish_finished(state)
        except (Exception, CheckpointException) as error:
            if self.unpublished and (reason := _cannot_write(error, self.unpublished[0].parent)):
                raise _not_saved(self.unpublished[0], error, reason) from error
            raise

    def last_published(self, state: GlobalState) -> Path | None:
        """Publish what is being saved, then return the checkpoint to resume from, if any; called on all ranks."""
        self.finalize_async_saves(state, blocking=True)
        saved = iterations(Path(str(self.checkpoint_config.load)))
        return from_main_process(lambda: next((path for path in saved if structure_damage(path) is None), None))

    def _check_writer(self, state: GlobalState) -> None:
        """Stop where a process that writes was killed; Megatron would wait for it for ever."""
        queue = state.async_calls_queue
        for call in queue.async_calls if queue is not None else ():
            writer = call.async_caller.process
            if writer is not None and not writer.is_alive():
                raise RunStopped(
                    f"the process that writes '{self.unpublished[0]}' on rank {global_rank()} is gone (exit code "
                    f"{writer.exitcode}); if its memory was short, set checkpoint.async_save=false, then repeat the "
                    "command",
                    alone=True,
                )

    def _publish_finished(self, state: GlobalState) -> None:
        config = config_of(state)
        while len(self.unpublished) > _running(state):
            iteration = self.unpublished.pop(0)
            if is_main_process():
                restore_tokenizer(str(config.tokenizer.tokenizer_model), iteration / "tokenizer")
            publish(iteration)
            if is_main_process():
                prune(iteration.parent, self.keep_last, config.resilience.keep_every)
            barrier()  # Bridge asks at every step, in most of which there is nothing to wait for


def _running(state: GlobalState) -> int:
    """Return the number of asynchronous saves that have not been finished, the same on all ranks."""
    queue = state.async_calls_queue
    return int(queue.get_num_unfinalized_calls()) if queue is not None else 0


def publish(iteration: Path) -> None:
    """Make a saved checkpoint the newest: checksums, then the mark, then the trackers; called on all ranks."""
    names = from_main_process(lambda: files_of(iteration))
    shards = all_gather_object(digests(iteration, names[global_rank() :: world_size()], durable=True))
    if is_main_process():
        write_checksums(iteration, {name: entry for shard in shards for name, entry in shard.items()})
        remove_mark(iteration)
        write_trackers(iteration)
    barrier()


def remove_mark(iteration: Path) -> None:
    """Declare a checkpoint complete."""
    mark_of(iteration).unlink(missing_ok=True)
    sync(iteration.parent)


def write_trackers(iteration: Path) -> None:
    """Name a checkpoint as the one to load in Bridge's two files, atomically."""
    folder, train_state = iteration.parent, iteration / "train_state.pt"
    if train_state.is_file():
        with atomic_file(folder / _TRACKED_STATE) as draft:
            shutil.copyfile(train_state, draft)
    write_atomic(folder / _TRACKED_STEP, str(step_of(iteration)))
    sync(folder)


def prune(folder: Path, keep_last: int, keep_every: int) -> None:
    """Remove older checkpoints.

    Args:
        folder: Folder of the checkpoints.
        keep_last: Number of the newest that stay; below 1 for all.
        keep_every: Interval, in steps, of those that stay as well; 0 for none.
    """
    published = [iteration for iteration in iterations(folder) if not mark_of(iteration).exists()]
    for iteration in published[keep_last:] if keep_last > 0 else []:
        if not keep_every or step_of(iteration) % keep_every:
            mark_of(iteration).touch()  # half removed is unfinished, not damaged
            shutil.rmtree(iteration)
            mark_of(iteration).unlink()


def latest_complete(folder: Path, step: int | None = None) -> Path | None:
    """Make the newest complete checkpoint the one that Bridge loads, and return it; called on all ranks.

    What is unfinished or damaged is renamed ``damaged-iter_*``; one line names each.

    Args:
        folder: Folder of the checkpoints.
        step: Take the checkpoint of this step and no other.

    Raises:
        UserError: None is complete, and not all were merely unfinished; nothing is renamed then.
    """
    complete, damages = find_complete(folder, step)
    if is_main_process():
        _quarantine_damaged(folder, complete, damages)
    barrier()
    return complete


def find_complete(folder: Path, step: int | None = None) -> tuple[Path | None, dict[Path, str]]:
    """Return the newest complete checkpoint of a run, if any, and the damage of later ones; change nothing.

    Raises:
        UserError: None is complete, and not all were merely unfinished.
    """
    candidates = from_main_process(lambda: [i for i in iterations(folder) if step is None or step_of(i) == step])
    damages: dict[Path, str] = {}
    for iteration in candidates:
        if (damage := _find_damage(iteration)) is None:
            break
        damages[iteration] = damage
    complete = candidates[len(damages)] if len(damages) < len(candidates) else None
    if complete is None:
        _refuse_to_start_anew(folder, damages)
    return complete, damages


_REMEDY = "put a copy in its place, or name another output to start anew"


def _refuse_to_start_anew(folder: Path, damages: dict[Path, str]) -> None:
    """Refuse to begin at step 0 where a checkpoint was complete once, in this start or before a quarantine."""
    if not all(from_main_process(lambda: [mark_of(iteration).exists() for iteration in damages])):
        reasons = ", ".join(f"'{iteration.name}': {damage}" for iteration, damage in damages.items())
        raise UserError(f"no checkpoint in '{folder}' is complete ({reasons}); {_REMEDY}")
    quarantined = sorted(folder.glob(f"{_QUARANTINE}iter_*"), reverse=True)
    if lost := [path.name for path in quarantined if not damages and not mark_of(path).exists()]:
        raise UserError(f"of the checkpoints in '{folder}' only '{lost[0]}' is left, which is damaged; {_REMEDY}")


def _find_damage(iteration: Path) -> str | None:
    """Return what is wrong with a checkpoint, or None; each rank reads a part of its files."""
    if (damage := from_main_process(lambda: structure_damage(iteration))) is not None:
        return damage
    names = sorted(recorded(iteration))
    damages = all_gather_object(content_damage(iteration, names[global_rank() :: world_size()]))
    return next((damage for damage in damages if damage), None)


def _quarantine_damaged(folder: Path, complete: Path | None, damages: dict[Path, str]) -> None:
    """Rename what cannot be loaded, finish removals that had begun, and let the trackers name the complete one."""
    for iteration, damage in damages.items():
        quarantined = iteration.with_name(f"{_QUARANTINE}{iteration.name}")
        if quarantined.exists():
            shutil.rmtree(quarantined)
        iteration.rename(quarantined)
        if mark_of(iteration).exists():
            mark_of(iteration).rename(mark_of(quarantined))
        warn(f"checkpoint '{iteration}': {damage}; it is '{quarantined.name}' now")
    for iteration in iterations(folder):
        if complete is not None and iteration < complete and mark_of(iteration).exists():
            shutil.rmtree(iteration)  # its removal had begun
    for mark in folder.glob(".iter_*.unfinished"):
        if not (folder / mark.name[1:].removesuffix(".unfinished")).exists():
            mark.unlink()
    if complete is not None:
        write_trackers(complete)
    elif damages:
        for tracker in (_TRACKED_STATE, _TRACKED_STEP):
            (folder / tracker).unlink(missing_ok=True)
        warn("no checkpoint had been finished: the run starts from its beginning")


def causes_of(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and its causes; Megatron's saving wraps what happened on each rank."""
    while error is not None:
        yield error
        for failure in getattr(error, "failures", {}).values():
            yield failure[0]
        error = error.__cause__ or error.__context__


def _cannot_write(error: BaseException, folder: Path) -> str:
    """Return what keeps a checkpoint from being written, or an empty string for another error."""
    if isinstance(error, CheckpointException) and not is_main_process():
        return "a file could not be written"  # rank 0 knows the reason, and says it
    causes = list(causes_of(error))
    for cause in causes:
        if isinstance(cause, OSError) and not isinstance(cause, ConnectionError | TimeoutError):
            return "the disk is full" if disk_is_full(cause) else str(cause.strerror or cause).lower()
    if any(word in str(cause) for cause in causes for word in _WRITER_ERRORS):  # which do not give the reason
        full = shutil.disk_usage(folder).free < _FULL
        return "the disk is full" if full else "a file could not be written, as on a full disk"
    return ""


def _not_saved(iteration: Path, error: BaseException, reason: str) -> RunStopped:
    """Return the message that ends the run, after the files that fill the disk are removed; their mark stays."""
    known_to_all = isinstance(error, CheckpointException)  # all ranks raise it
    if is_main_process() or not known_to_all:
        shutil.rmtree(iteration, ignore_errors=True)
    intact = [path.name for path in iterations(iteration.parent) if structure_damage(path) is None]
    last = f"'{intact[0]}' is intact" if intact else "there is none before it"
    remedy = "make room and repeat" if iteration.parent.is_dir() else "its folder was removed; repeat"
    return RunStopped(
        f"checkpoint '{iteration}' could not be saved: {reason} ({last}); {remedy} the command",
        alone=not known_to_all,
    )
