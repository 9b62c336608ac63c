"""Train a configuration, alone or under torchrun; a run continues where its output folder has a checkpoint."""

import contextlib
import logging
import math
import netrc
import os
import signal
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import yaml

from nemodiff_train.config.config import TriModeConfig
from nemodiff_train.config.context import StepContext
from nemodiff_train.config.precision import precision_of, slow_precision_warning
from nemodiff_train.config.run import AdapterBase
from nemodiff_train.console import console, say
from nemodiff_train.distributed import REPORT_DELAY, ReservedPort, global_rank, is_main_process, world_size
from nemodiff_train.errors import RunStopped, UserError, disk_is_full, refusal
from nemodiff_train.files import locked
from nemodiff_train.model.checksums import identity
from nemodiff_train.model.provider import fit_to_host
from nemodiff_train.processes import ENDING
from nemodiff_train.resilience.checkpoints import MANAGER, causes_of, find_complete
from nemodiff_train.resilience.gradient_guard import GradientGuard
from nemodiff_train.resilience.replicas import ReplicaConsistencyCheck
from nemodiff_train.resilience.restarts import keep_wandb_run, record_start
from nemodiff_train.resilience.stragglers import StragglerMonitor
from nemodiff_train.resilience.watchdog import Watchdog
from nemodiff_train.runtime import init_runtime
from nemodiff_train.runtime.patches import allow_larger_tokenizers, silence_signal_handlers
from nemodiff_train.signals import TerminatedBeforeFirstStep, exit_on_signals, restore_signal_handlers
from nemodiff_train.training.callbacks.base_drafter import BaseDrafter
from nemodiff_train.training.callbacks.fused_optimizer import FusedOptimizer
from nemodiff_train.training.callbacks.loop_evaluation import LoopEvaluation
from nemodiff_train.training.callbacks.loss_breakdown import LossBreakdown
from nemodiff_train.training.callbacks.mask_embedding import MaskEmbedding
from nemodiff_train.training.callbacks.run_log import RunLog
from nemodiff_train.training.step import ForwardStep
from nemodiff_train.validation.check import check
from nemodiff_train.validation.dry_run import dry_run
from nemodiff_train.validation.resume import description, samples_ahead


def check_run(config: TriModeConfig, defaults: dict[str, Any], gpus: int | None, gpu_memory: float) -> int:
    """Check a run on any machine without starting it, and print one page.

    Args:
        config: The run.
        defaults: The settings that its recipe has by itself.
        gpus: GPUs of the run; None for the fewest that its layout takes.
        gpu_memory: GB (1e9 bytes) of one GPU.

    Returns:
        0, or 2 if problems were found.
    """
    config.requested_settings = config.settings()
    _fit_to_host(config)
    load = config.checkpoint.load
    known_problems = refusal(lambda: find_complete(Path(load), config.checkpoint.ckpt_step)) if load else []
    return dry_run(config, defaults, gpus, gpu_memory, known_problems)


def resolved_yaml(config: TriModeConfig) -> str:
    """Return the whole configuration of a run as YAML, as this machine would train it.

    Raises:
        UserError: There is no usable mask token.
    """
    _fit_to_host(config)
    config.mixed_precision = precision_of(config, init_runtime().cuda)
    config.propagate()
    return yaml.safe_dump(config.sections(), sort_keys=False)


def train(config: TriModeConfig) -> None:
    """Run Bridge's ``pretrain()`` with the joint objective.

    Losses, data order and noise depend on the configuration alone, not on the layout.  What Megatron
    prints goes to ``train.log`` beside the checkpoints; the console shows one progress line.

    Raises:
        UserError: The configuration cannot run here; nothing has been written.
        RunStopped: The run cannot continue.
        SystemExit: With 0, after a signal: the step is saved.
        TerminatedBeforeFirstStep: After a signal before the first step.
    """
    config.requested_settings = config.settings()
    _fit_to_host(config)
    config.mixed_precision = precision_of(config, init_runtime().cuda)
    _protect(config)
    if "MASTER_PORT" not in os.environ:  # alone: Megatron's fixed port may be another run's
        port = ReservedPort()
        os.environ["MASTER_PORT"] = str(port.number)
    check(config, world_size())
    if slow := slow_precision_warning(config.mixed_precision, init_runtime().cuda):
        say(slow)
    if config.peft is not None and config.start:  # the checkpoints of adapters say which weights they are trained on
        base = config.start.iteration
        config.adapter_base = AdapterBase(base.name, identity(base))
    if config.saved:
        config.dataset.samples_ahead = samples_ahead(config.saved, config)
        say(description(config.saved, config))
    _stay_offline_unless_logged_in(config)
    output = Path(config.checkpoint.save).parent
    try:
        _run(config, output)
    except OSError as error:  # on a full disk, closing a log fails as well, after the error that counts
        stop = next((cause for cause in causes_of(error) if isinstance(cause, RunStopped)), None)
        if stop is None and disk_is_full(error):
            stop = RunStopped(f"the disk of '{output}' is full; make room and repeat the command", alone=True)
        if stop is None:
            raise
        raise stop from error


def _run(config: TriModeConfig, output: Path) -> None:
    step_context = StepContext(output)
    log = RunLog(step_context)
    with contextlib.ExitStack() as stack:
        stack.callback(restore_signal_handlers)
        exit_on_signals(*ENDING)
        stack.enter_context(locked(output))
        record_end = stack.enter_context(record_start(output, config.resilience.restarts))
        say(_announcement(config))
        from megatron.bridge.training import setup  # after the line: these take a second
        from megatron.bridge.training.pretrain import pretrain  # imports W&B, which reads its mode then
        from megatron.bridge.training.utils import sig_utils

        allow_larger_tokenizers(setup)
        silence_signal_handlers(sig_utils)
        if config.logger.wandb_project:
            stack.enter_context(keep_wandb_run(output))
        prints = global_rank() in (0, world_size() - 1)  # the last rank has the losses
        output.mkdir(parents=True, exist_ok=True)
        log_file = stack.enter_context(open(output / "train.log" if prints else os.devnull, "a", buffering=1))
        stack.enter_context(contextlib.redirect_stdout(log_file))
        watchdog = stack.enter_context(Watchdog(step_context, config.resilience, record_end))
        stack.callback(log.close)
        # After a step, what measures comes before what may stop the run or roll back to a checkpoint; the log comes
        # last and writes the figures that all others have added to `step_context`.
        callbacks = [
            BaseDrafter(),
            FusedOptimizer(),
            MaskEmbedding(step_context),
            LossBreakdown(step_context),
            LoopEvaluation(step_context),
            ReplicaConsistencyCheck(),
            StragglerMonitor(step_context),
            GradientGuard(step_context),
            watchdog,
            log,
        ]
        try:
            pretrain(config, ForwardStep(step_context), callbacks=callbacks)
        except RuntimeError as error:
            if not _another_rank_is_gone(error):
                raise
            time.sleep(REPORT_DELAY)
            line = f"rank {global_rank()}: lost the connection to another rank; see that rank's last message"
            raise RunStopped(f"{line}, then repeat the command", alone=True) from error
        except SystemExit as leaving:
            if not leaving.code and not isinstance(leaving, TerminatedBeforeFirstStep) and is_main_process():
                console.print(f"stopped after step {step_context.step}, which is saved; repeat the command to resume")
            raise


def _announcement(config: TriModeConfig) -> str:
    """Return one line on what is about to be trained; the first step may be minutes away."""
    ranks, model, train = world_size(), config.model, config.train
    start = (
        f"step {config.saved.step}" if config.saved else config.checkpoint.pretrained_checkpoint or "random weights"
    )
    trained = "AR stage" if config.objective.stage == "ar" else "joint stage"
    if config.peft:
        trained = "path selector" if config.selector_rank else "drafter" if config.drafter else "adapters"
    sizes = {
        "tensor": model.tensor_model_parallel_size,
        "pipeline": model.pipeline_model_parallel_size,
        "context": model.context_parallel_size,
    }
    layout = ", ".join(f"{name} {size}" for name, size in sizes.items() if size > 1)
    return (
        f"training: {trained}, from {start}; {train.train_iters:,} steps of "
        f"{train.global_batch_size:,} x {config.dataset.seq_length:,} tokens on "
        f"{ranks} process{'es' if ranks > 1 else ''}{f' ({layout})' if layout else ''}"
    )


def _protect(config: TriModeConfig) -> None:
    """Change the settings of Bridge that resilience depends on."""
    config.train.exit_signal_handler, config.train.exit_signal = True, signal.SIGUSR1  # slurm/train.sbatch sends it
    config.checkpoint.custom_manager_class = MANAGER
    # The schedule is that of the settings, which were compared with those of the checkpoint already.
    config.scheduler.override_opt_param_scheduler = not config.scheduler.use_checkpoint_opt_param_scheduler
    # GradientGuard checks every gradient; these would end one rank with a traceback, and leave the others waiting.
    config.rerun_state_machine.check_for_nan_in_loss = False
    config.ddp.check_for_nan_in_grad = False
    config.train.check_optimizer_step_success = False  # the ranks agree already
    # The watchdog is to write the stacks of a hang before collectives give up and end the processes.
    limits = config.resilience.setup_timeout, config.resilience.hang_timeout
    wait = math.ceil(max(limits) / 60) + 10
    config.dist.distributed_timeout_minutes = max(config.dist.distributed_timeout_minutes, wait)
    logging.getLogger("megatron.bridge.training.pretrain").addFilter(_needs_traceback)


def _needs_traceback(record: logging.LogRecord) -> bool:
    """Return whether a traceback says more than the one line that follows it."""
    error = record.exc_info[1] if record.exc_info else None
    is_explained = isinstance(error, RunStopped | UserError | SystemExit) or disk_is_full(error)
    return not (is_explained or _another_rank_is_gone(error))


_GONE = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "remote process exited")
"""Messages of Gloo and NCCL about a rank that has ended."""


def _another_rank_is_gone(error: BaseException | None) -> bool:
    """Return whether a collective failed because a rank has ended."""
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _GONE)


def _fit_to_host(config: TriModeConfig) -> None:
    """Adapt the settings to what this machine lacks; a GPU machine with every package changes nothing."""
    host = init_runtime()
    config.dist.distributed_backend = host.backend
    fit_to_host(config.model)
    if not host.cuda:
        config.model.use_cpu_initialization = True
        config.dataset.num_workers = 0
        config.dataset.pin_memory = False


def _stay_offline_unless_logged_in(config: TriModeConfig) -> None:
    """Set the mode that Weights & Biases reads when it is imported, by whether it has a login."""
    if not config.logger.wandb_project or os.environ.get("WANDB_API_KEY"):
        return
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        logged_in = netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        logged_in = False
    if not logged_in:
        os.environ.setdefault("WANDB_MODE", "offline")
