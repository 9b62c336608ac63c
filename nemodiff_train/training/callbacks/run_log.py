"""The log of a run: a progress line, one JSON line per step, and figures besides Bridge's own."""

import json
import os
import time
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import IO, Any

import torch
import yaml
from megatron.bridge.training.callbacks import Callback, CallbackContext
from megatron.bridge.training.state import GlobalState
from rich.progress import Progress
from tensorboard.compat.proto.event_pb2 import Event, SessionLog

from nemodiff_train.config.context import StepContext, config_of
from nemodiff_train.console import console, progress_bar
from nemodiff_train.distributed import global_rank, world_size
from nemodiff_train.files import write_atomic
from nemodiff_train.planning.hardware import gpu_named
from nemodiff_train.planning.workload import workload_of
from nemodiff_train.report.run_page import RunPage
from nemodiff_train.runtime import init_runtime

HEADLINE = {"ar_loss": "AR", "diffusion_loss": "diffusion", "draft_loss": "draft", "expected_tpf": "TPF"}
"""Figures of the progress line, and what it calls them."""

PAGE_SECONDS = 10.0
"""Between two versions of the page, evaluations apart."""


class RunLog(Callback):
    """Show and record each step on the last rank, the one that has the losses.

    Bridge writes losses, learning rate and gradient norm to TensorBoard and W&B; this adds ``tokens_per_second``,
    ``mfu`` and the figures of other callbacks there, and writes ``metrics.jsonl``, ``index.html`` and a progress
    line. docs/training.md describes them.

    Args:
        step_context: Figures that other callbacks have added; cleared after each step.
    """

    def __init__(self, step_context: StepContext) -> None:
        self.step_context = step_context
        self.file: IO[str] | None = None
        self.progress: Progress | None = None
        self.page: RunPage | None = None

    def on_train_start(self, context: CallbackContext) -> None:
        config, step = config_of(context.state), context.state.train_state.step
        self.tokens_per_step = config.train.global_batch_size * config.dataset.seq_length
        self.steps, self.line_interval = config.train.train_iters, config.diagnostics.line_interval
        if global_rank() != world_size() - 1:
            return
        self.progress = progress_bar("{task.fields[figures]}", shown=console.is_terminal)
        gpu = gpu_named(torch.cuda.get_device_name()) if init_runtime().cuda else None
        step_flops = workload_of(config).flops * config.train.global_batch_size
        self.ideal = step_flops / (world_size() * gpu.flops) if gpu else 0.0  # seconds per step at the GPUs' peak
        self.line_started, self.line_step = time.monotonic(), step
        path = self.step_context.metrics_file
        path.parent.mkdir(parents=True, exist_ok=True)
        drop_after(path, step)
        _hide_after(context.state, step)
        self.file = path.open("a")
        stage = "drafter" if config.drafter else config.objective.stage
        settings = yaml.dump(config.sections(), Dumper=yaml.CSafeDumper, sort_keys=False)
        self.page = RunPage(self.step_context.output.name, stage, self.steps, settings)
        self.page_written = time.monotonic()
        with path.open() as earlier:
            for line in earlier:
                self.page.add(json.loads(line))
        self.progress.start()
        self.task = self.progress.add_task(f"training ({stage})", total=self.steps, completed=step, figures="")

    def on_train_step_start(self, context: CallbackContext) -> None:
        self.started = time.perf_counter()
        groups = context.optimizer.param_groups if context.optimizer is not None else []
        self.learning_rate = float(groups[0]["lr"]) if groups else None

    def on_train_step_end(self, context: CallbackContext) -> None:
        seconds = time.perf_counter() - self.started
        added, self.step_context.figures = self.step_context.figures, {}
        if self.file is None:
            return
        step = context.state.train_state.step + 1  # Bridge counts the step after this callback
        losses = {name: value.item() for name, value in (context.loss_dict or {}).items()}
        speed = {"tokens_per_second": self.tokens_per_step / seconds}
        if self.ideal:
            speed["mfu"] = self.ideal / seconds
        if board := context.state.tensorboard_logger:
            for name, value in {**speed, **added}.items():
                board.add_scalar(name, value, step)
        if context.state.wandb_logger:
            context.state.wandb_logger.log({**speed, **added}, step)
        update = {
            "learning_rate": self.learning_rate,
            "grad_norm": None if context.grad_norm is None else float(context.grad_norm),
        }
        counted = {"step": step, "tokens": step * self.tokens_per_step}
        record = {**counted, **losses, **update, **speed, "seconds": seconds, **added}
        print(json.dumps(record), file=self.file, flush=True)
        assert self.progress is not None and self.page is not None
        self.progress.update(self.task, completed=step, figures=_headline({**losses, **speed}))
        due = self.line_interval and (step % self.line_interval == 0 or step == self.steps)
        if due and not console.is_terminal:
            self._print_line(record)
        self.page.add(record)
        evaluated, self.step_context.evaluated = self.step_context.evaluated, None
        if evaluated is not None:
            self.page.show(*evaluated)
        if evaluated or time.monotonic() - self.page_written >= PAGE_SECONDS:
            self._write_page()

    def _write_page(self) -> None:
        if self.page is not None and self.page.last and self.step_context.output.is_dir():  # else it was removed
            write_atomic(self.step_context.output / "index.html", self.page.render())
            self.page_written = time.monotonic()

    def _print_line(self, record: Mapping[str, Any]) -> None:
        """Print one line for a log file; speeds are means since the line before, pauses included."""
        now, step = time.monotonic(), int(record["step"])
        seconds = (now - self.line_started) / (step - self.line_step)
        self.line_started, self.line_step = now, step
        figures = {**record, "tokens_per_second": self.tokens_per_step / seconds}
        rate = "" if record["learning_rate"] is None else f"lr {record['learning_rate']:.3g} · "
        norm = "skipped" if record["grad_norm"] is None else f"grad norm {record['grad_norm']:.3g}"
        utilization = f" · MFU {self.ideal / seconds:.1%}" if self.ideal else ""
        left = timedelta(seconds=round((self.steps - step) * seconds))
        console.print(
            f"step {step}/{self.steps} · {_headline(figures)} · {rate}{norm} · "
            f"{seconds:.3g} s/step{utilization} · {left} left",
            soft_wrap=True,
        )

    def on_train_end(self, context: CallbackContext) -> None:
        self.close()

    def close(self) -> None:
        """End the progress line and the file; Bridge does not call ``on_train_end`` when a run is stopped."""
        if self.progress is not None:
            self.progress.stop()
        if self.file is not None and not self.file.closed:
            self.file.close()
            self._write_page()


def drop_after(path: Path, step: int) -> None:
    """Cut the lines of ``metrics.jsonl`` that a resume from ``step`` writes again, and a line that is incomplete."""
    if not path.exists():
        return
    end = 0
    with path.open("rb") as file:
        for line in file:
            try:
                if not line.endswith(b"\n") or not float(json.loads(line)["step"]) <= step:
                    break
            except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
                break
            end += len(line)
    os.truncate(path, end)


def _hide_after(state: GlobalState, step: int) -> None:
    """Let TensorBoard hide what an earlier start has logged after ``step`` and this start logs again."""
    if state.tensorboard_logger:
        start = SessionLog(status=SessionLog.START)
        state.tensorboard_logger.file_writer.add_event(Event(session_log=start), step=step + 1)


def _headline(figures: dict[str, float]) -> str:
    losses = " ".join(f"{short} {figures[name]:.3f}" for name, short in HEADLINE.items() if name in figures)
    return f"{losses} · {figures['tokens_per_second']:,.0f} tok/s"
