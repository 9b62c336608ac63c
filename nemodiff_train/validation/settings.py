"""Settings and the schedule: values out of range, unknown choices, and what Bridge refuses with a traceback."""

import copy
import importlib.util
import re
from collections.abc import Iterator
from dataclasses import MISSING, fields
from functools import partial
from operator import attrgetter
from pathlib import Path, PurePath
from types import SimpleNamespace
from typing import TYPE_CHECKING

from nemodiff_train.config.ranges import check_range
from nemodiff_train.config.run import ResilienceConfig
from nemodiff_train.errors import UserError, nearest, refusal
from nemodiff_train.schema import check_type

if TYPE_CHECKING:
    from nemodiff_train.config.config import TriModeConfig

SIZES = (
    "train.train_iters", "train.global_batch_size", "train.micro_batch_size", "train.exit_interval",
    "dataset.seq_length", "dataset.num_workers", "model.tensor_model_parallel_size",
    "model.pipeline_model_parallel_size", "model.context_parallel_size", "model.num_layers", "optimizer.lr",
    "scheduler.lr_warmup_iters", "checkpoint.save_interval", "logger.log_interval", "rng.seed",
)  # fmt: skip
"""Settings that other rules compute with."""
CHOICES = {
    "checkpoint.ckpt_format": ("torch_dist",),
    "checkpoint.async_strategy": ("mcore",),
    "checkpoint.async_write_results_mp_mode": ("fork", "forkserver", "spawn"),
    "dataset.dataloader_type": ("single", "cyclic"),
    "ddp.data_parallel_sharding_strategy": ("no_shard", "optim", "optim_grads", "optim_grads_params"),
    "ddp.outer_dp_sharding_strategy": ("no_shard", "optim"),
    "logger.runtime_time_unit": ("seconds", "minutes", "hours", "days"),
}
"""Choices of Bridge's text settings that do not declare them."""
_OPTIMIZERS = ("muon", "adaptive_muon", "soap", "lion", "sgd")
"""Beginnings of settings that one optimizer alone reads."""
_ONLY_WITH = {
    "profiling": (
        "profiling.use_nsys_profiler", "profiling.use_pytorch_profiler", "profiling.record_memory_history",
        "profiling.nvtx_ranges",
    ),
    "ddp.(fsdp_|megatron_fsdp_|outer_dp_|data_parallel_sharding|keep_fp8_|disable_symm)": ("ddp.use_megatron_fsdp",),
    "logger.tensorboard_|logger.log_.*_to_tensorboard": (
        "logger.tensorboard_dir", "logger.wandb_project", "logger.mlflow_experiment", "logger.comet_project",
    ),
    "logger.wandb_": ("logger.wandb_project",),
    "logger.mlflow_": ("logger.mlflow_experiment",),
    "logger.comet_": ("logger.comet_project",),
    "logger.moe_": ("model.num_moe_experts",),
    "model.cpu_offloading_": ("model.cpu_offloading",),
    "model.tp_comm_": ("model.tp_comm_overlap",),
    "model.recompute_(method|num_layers|modules)": ("model.recompute_granularity",),
    "model.(offload_modules|.*_offload_|fine_grained_offloading_|.*offloaded_)": (
        "model.fine_grained_activation_offloading",
    ),
    "optimizer.optimizer_offload_|optimizer.overlap_cpu_|optimizer.pin_cpu_": ("optimizer.optimizer_cpu_offload",),
    "rerun_state_machine.error_injection_type": ("rerun_state_machine.error_injection_rate",),
    "rerun_state_machine.spiky_loss_factor": ("rerun_state_machine.check_for_spiky_loss",),
}  # fmt: skip
"""Settings by the beginnings of their names, which nothing reads unless one of the listed ones is set."""
_READ = ("dist.nccl_communicator_config_path", "dataset.dataloader_load")
"""Files that a run reads besides its own."""


def problems(config: "TriModeConfig") -> Iterator[str]:
    """Yield the settings with an unknown choice or a value out of range, one line each."""
    for name in ("objective", "drafter", "diagnostics", "evaluation", "resilience"):
        yield from section_problems(name, getattr(config, name))
    yield from schedule_problems(config)
    yield from _bridge_choices(config)
    yield from _bridge_refusals(config)


def size_problems(config: "TriModeConfig") -> Iterator[str]:
    """Yield the sizes that are too small for other rules to be computed, one line each."""
    for key in SIZES:
        yield from refusal(partial(check_range, key, attrgetter(key)(config)))


def check_sizes(config: "TriModeConfig") -> None:
    """Refuse sizes that nothing can be computed with.

    Raises:
        UserError: One line with all of them.
    """
    if lines := [*size_problems(config)]:
        raise UserError("; ".join(lines))


def section_problems(name: str, section: object | None) -> Iterator[str]:
    """Yield the fields of one section with an unknown choice or a value out of range, one line each.

    Args:
        name: Name of the section in the configuration.
        section: A dataclass of this project's; None if the configuration has none.
    """
    parent = SimpleNamespace(**{name: section})
    for field in fields(section) if section is not None else ():  # type: ignore[arg-type]
        key, value = f"{name}.{field.name}", getattr(section, field.name)
        checked = partial(check_type, parent, key, as_written=value is None)
        of_type = [] if isinstance(value, PurePath) else refusal(checked)  # a path is a text as good as any
        yield from of_type or refusal(partial(check_range, key, value))
    if isinstance(section, ResilienceConfig) and 0 < section.spike_factor <= 1:
        yield f"resilience.spike_factor is {section.spike_factor}; use a factor above 1, or 0 for none"


def schedule_problems(config: "TriModeConfig") -> Iterator[str]:
    """Yield what keeps the learning rate from its peak or its end, one line each."""
    schedule, steps = config.scheduler, config.train.train_iters
    if not steps:
        return
    length = schedule.max_steps or schedule.lr_decay_iters or steps
    run = f"train.train_iters={steps}" if length == steps else f"a schedule of {length} steps"
    if schedule.lr_decay_iters and schedule.lr_decay_iters > steps and not schedule.max_steps:
        yield (
            f"scheduler.lr_decay_iters={schedule.lr_decay_iters} does not fit train.train_iters={steps}: the rate "
            "would not come down; leave it out"
        )
    warmup = schedule.lr_warmup_iters or round((schedule.lr_warmup_fraction or 0) * length)
    if warmup >= length:
        yield (
            f"scheduler.lr_warmup_iters={warmup} does not fit {run}: the learning rate would not reach its peak; use "
            "fewer steps, or a fraction of the run with scheduler.lr_warmup_fraction"
        )
    elif schedule.lr_decay_style == "WSD" and warmup + (decay := schedule.lr_wsd_decay_iters or length) > length:
        yield (
            f"scheduler.lr_wsd_decay_iters={decay} and {warmup} steps of warm-up do not fit {run}: the learning rate "
            "would jump; use fewer steps, or a fraction of the run with scheduler.lr_wsd_decay_fraction"
        )


def _bridge_choices(config: "TriModeConfig") -> Iterator[str]:
    if config.train.rampup_batch_size is not None:
        yield (
            "train.rampup_batch_size has no effect: Megatron-Core no longer ramps batches up; use "
            "train.global_batch_size alone"
        )
    optimizer = config.optimizer.optimizer
    if optimizer not in ("adam", "sgd") and importlib.util.find_spec("emerging_optimizers") is None:
        yield f"optimizer.optimizer is '{optimizer}'; use 'adam' or 'sgd', or install emerging-optimizers"
    for field in fields(config.optimizer):
        kind = next((kind for kind in _OPTIMIZERS if field.name.startswith(f"{kind}_")), "")
        if kind and kind not in optimizer and getattr(config.optimizer, field.name) != field.default:
            yield f"optimizer.{field.name} has no effect with optimizer.optimizer={optimizer}; leave it out"
    yield from _switched_off(config)
    for key in _READ:
        section, _, name = key.partition(".")
        if (file := getattr(getattr(config, section), name, None)) and not Path(file).exists():
            yield f"{key}={file}: no such file"
    for key, choices in CHOICES.items():
        if (value := attrgetter(key)(config)) not in choices:
            yield f"{key} is '{value}'; use '{"' or '".join(choices)}'.{nearest(str(value), choices)}"


def _switched_off(config: "TriModeConfig") -> Iterator[str]:
    """Yield the settings that were changed though nothing reads them as long as another is off."""
    for start, switches in _ONLY_WITH.items():
        if any(attrgetter(switch)(config) for switch in switches):
            continue
        section = getattr(config, start.partition(".")[0])
        for field in fields(section):
            key = f"{start.partition('.')[0]}.{field.name}"
            default = field.default if field.default_factory is MISSING else field.default_factory()
            if re.match(start, key) and key not in switches and getattr(section, field.name) != default:
                yield f"{key} has no effect without {' or '.join(switches)}; set that too, or leave it out"


def _bridge_refusals(config: "TriModeConfig") -> Iterator[str]:
    """Yield what Bridge would refuse later, with a traceback."""
    for name in ("optimizer", "logger", "train", "scheduler", "checkpoint"):
        try:
            copy.deepcopy(getattr(config, name)).finalize()
        except Exception as error:  # a value of another type, or a logger whose package is missing
            yield f"{name}: {str(error).partition(chr(10))[0]}"
