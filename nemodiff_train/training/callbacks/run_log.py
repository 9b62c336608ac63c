"""What a run tells: a progress line, a JSONL of every step, and tokens/s beside Bridge's own figures."""

import json
import os
import time
from collections import deque
from pathlib import Path
from typing import IO, Any

from megatron.bridge.training.callbacks import Callback, CallbackContext
from megatron.bridge.training.utils.pg_utils import get_pg_collection
from rich.progress import Progress

from nemodiff_train.console import progress_bar
from nemodiff_train.distributed import global_rank, world_size
from nemodiff_train.training.callbacks.loss_breakdown import LossTally


class RunLog(Callback):
    """Shows and records each step on the last rank, the one that has the losses.

    Bridge writes losses, learning rate and gradient norm to TensorBoard and W&B; this adds tokens/s
    there, a progress line on the console, and ``metrics.jsonl``, one object a step:
    ``step``, the reported losses (nats), ``grad_norm``, ``tokens_per_second`` (clean tokens), ``seconds``.

    Every ``diagnostics.loss_interval`` steps the diffusion loss by noise level and by place is added.

    Args:
        directory: Where ``metrics.jsonl`` is appended to.
        tally: Where the forward step adds up losses by noise level and place.
    """

    def __init__(self, directory: Path, tally: LossTally) -> None:
        self.path = directory / "metrics.jsonl"
        self.file: IO[str] | None = None
        self.tally = tally
        self.extra: dict[str, float] = {}
        self.progress: Progress | None = None

    def note(self, figures: dict[str, float]) -> None:
        """Add figures of the step that has just run; on any rank, kept on the last."""
        self.extra.update(figures)

    def on_train_start(self, context: CallbackContext) -> None:
        config: Any = context.state.cfg
        self.tokens_per_step = config.train.global_batch_size * config.dataset.seq_length
        self.speaks = global_rank() == world_size() - 1
        self.progress = progress_bar("{task.fields[figures]}", shown=self.speaks)
        if not self.speaks:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        drop_after(self.path, context.state.train_state.step)
        self.file = self.path.open("a")
        self.progress.start()
        self.task = self.progress.add_task(
            f"training ({'drafter' if config.drafter else config.objective.stage})",
            total=config.train.train_iters,
            completed=context.state.train_state.step,
            figures="",
        )

    def on_train_step_start(self, context: CallbackContext) -> None:
        self.started = time.perf_counter()

    def on_train_step_end(self, context: CallbackContext) -> None:
        seconds = time.perf_counter() - self.started
        step = context.state.train_state.step + 1  # Bridge counts the step after this callback
        interval = context.state.cfg.diagnostics.loss_interval
        if interval and step % interval == 0 and context.loss_dict:
            self.note(self.tally.take(get_pg_collection(context.model).dp_cp))
        if self.file is None:
            return
        figures = {name: value.item() for name, value in (context.loss_dict or {}).items()}
        extra = {"tokens_per_second": self.tokens_per_step / seconds, **self.extra}
        self.extra = {}
        _write_to_loggers(context, extra, step)
        figures["tokens_per_second"] = extra.pop("tokens_per_second")
        record = {"step": step, **figures, "grad_norm": _number(context.grad_norm), "seconds": seconds, **extra}
        print(json.dumps(record), file=self.file, flush=True)
        assert self.progress is not None
        self.progress.update(self.task, completed=step, figures=_headline(figures))

    def on_train_end(self, context: CallbackContext) -> None:
        self.close()

    def close(self) -> None:
        """End the progress line and the file; Bridge does not call ``on_train_end`` when a run is stopped."""
        if self.progress is not None:
            self.progress.stop()
        if self.file is not None:
            self.file.close()


def drop_after(path: Path, step: int) -> None:
    """Cut what a resume from ``step`` trains again from ``metrics.jsonl``, and what a kill left half written."""
    if not path.exists():
        return
    end = 0
    with path.open("rb") as file:
        for line in file:
            if not line.endswith(b"\n") or _step(line) > step:
                break
            end += len(line)
    os.truncate(path, end)


def _step(line: bytes) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")


def recorded_norms(path: Path, count: int) -> list[float]:
    """The gradient norms of the last ``count`` updates in ``metrics.jsonl``."""
    with path.open("rb") as file:
        norms = (json.loads(line).get("grad_norm") for line in file)
        return list(deque((norm for norm in norms if norm is not None), maxlen=count))


def _write_to_loggers(context: CallbackContext, figures: dict[str, float], step: int) -> None:
    state = context.state
    if state.tensorboard_logger:
        for name, value in figures.items():
            state.tensorboard_logger.add_scalar(name, value, step)
    if state.wandb_logger:
        state.wandb_logger.log(figures, step)


def _number(value: Any) -> float | None:
    return None if value is None else float(value)


def _headline(figures: dict[str, float]) -> str:
    names = {"ar_loss": "AR", "diffusion_loss": "diffusion", "draft_loss": "draft", "expected_tpf": "TPF"}
    losses = " ".join(f"{short} {figures[name]:.3f}" for name, short in names.items() if name in figures)
    return f"{losses} · {figures['tokens_per_second']:,.0f} tok/s"
