"""What a run tells: a progress line, a JSONL of every step, and tokens/s beside Bridge's own figures."""

import json
import time
from pathlib import Path
from typing import IO, Any

import torch.distributed as dist
from megatron.bridge.training.callbacks import Callback, CallbackContext

from nemodiff_train.console import progress_bar


class RunLog(Callback):
    """Shows and records each step on the last rank, the one that has the losses.

    Bridge writes losses, learning rate and gradient norm to TensorBoard and W&B; this adds tokens/s
    there, a progress line on the console, and ``metrics.jsonl``, one object a step:
    ``step``, the reported losses (nats), ``gradient norm``, ``tokens/s`` (clean tokens), ``seconds``.

    Args:
        directory: Where ``metrics.jsonl`` is appended to.
    """

    def __init__(self, directory: Path) -> None:
        self.path = directory / "metrics.jsonl"
        self.file: IO[str] | None = None

    def on_train_start(self, context: CallbackContext) -> None:
        config: Any = context.state.cfg
        self.tokens_per_step = config.train.global_batch_size * config.dataset.seq_length
        self.speaks = dist.get_rank() == dist.get_world_size() - 1
        self.progress = progress_bar("{task.fields[figures]}", shown=self.speaks)
        if not self.speaks:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.file = self.path.open("a")
        self.progress.start()
        self.task = self.progress.add_task(
            f"training ({config.objective.stage})",
            total=config.train.train_iters,
            completed=context.state.train_state.step,
            figures="",
        )

    def on_train_step_start(self, context: CallbackContext) -> None:
        self.started = time.perf_counter()

    def on_train_step_end(self, context: CallbackContext) -> None:
        if self.file is None:
            return
        seconds = time.perf_counter() - self.started
        figures = {name: value.item() for name, value in (context.loss_dict or {}).items()}
        figures["tokens/s"] = self.tokens_per_step / seconds
        step = context.state.train_state.step + 1  # Bridge counts the step after this callback
        self._write_to_loggers(context, figures["tokens/s"], step)
        record = {"step": step, **figures, "gradient norm": _number(context.grad_norm), "seconds": seconds}
        print(json.dumps(record), file=self.file, flush=True)
        self.progress.update(self.task, completed=step, figures=_headline(figures))

    def on_train_end(self, context: CallbackContext) -> None:
        self.progress.stop()
        if self.file is not None:
            self.file.close()

    def _write_to_loggers(self, context: CallbackContext, rate: float, step: int) -> None:
        state = context.state
        if state.tensorboard_logger:
            state.tensorboard_logger.add_scalar("tokens per second", rate, step)
        if state.wandb_logger:
            state.wandb_logger.log({"tokens per second": rate}, step)


def _number(value: Any) -> float | None:
    return None if value is None else float(value)


def _headline(figures: dict[str, float]) -> str:
    names = {"ar loss": "AR", "diffusion loss": "diffusion"}
    losses = " ".join(f"{short} {figures[name]:.3f}" for name, short in names.items() if name in figures)
    return f"{losses} · {figures['tokens/s']:,.0f} tok/s"
