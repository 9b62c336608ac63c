"""Single settings: values out of range, unknown choices, and what Bridge itself would refuse with a traceback."""

import copy
import importlib.util
import math
import re
from collections.abc import Iterator
from dataclasses import MISSING, fields
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args, get_origin

from nemodiff_train.config.run import ResilienceConfig
from nemodiff_train.errors import UserError, nearest

if TYPE_CHECKING:
    from nemodiff_train.config.config import TriModeConfig

SIZES = {
    "train.train_iters": 1,
    "train.global_batch_size": 1,
    "train.micro_batch_size": 1,
    "train.exit_interval": 0,
    "dataset.seq_length": 1,
    "dataset.num_workers": 0,
    "model.tensor_model_parallel_size": 1,
    "model.pipeline_model_parallel_size": 1,
    "model.context_parallel_size": 1,
    "model.num_layers": 1,
    "optimizer.lr": 0,
    "scheduler.lr_warmup_iters": 0,
    "checkpoint.save_interval": 0,
    "logger.log_interval": 1,
    "rng.seed": 1,
}
"""Smallest value of each setting that other rules compute with."""

AT_LEAST = {
    "objective.alpha": 0,
    "objective.ar_weight": 0,
    "objective.alpha_ramp_steps": 0,
    "objective.mask_embedding_noise": 0,
    "objective.mask_embedding_noise_steps": 0,
    "objective.views": 1,
    "drafter.support": 0,
    "drafter.position_decay": 0,
    "diagnostics.loss_interval": 0,
    "diagnostics.line_interval": 0,
    "evaluation.interval": 0,
    "resilience.keep_every": 0,
    "resilience.spike_factor": 0,
    "resilience.spike_window": 2,
    "resilience.max_consecutive_skips": 0,
    "resilience.replica_check_interval": 0,
    "resilience.hang_timeout": 0,
    "resilience.setup_timeout": 0,
    "resilience.straggler_interval": 0,
    "resilience.restarts": 0,
}
"""Smallest value of each of the other settings."""

ABOVE_ZERO = ("objective.position_bias_half_life", "drafter.temperature", "resilience.exit_grace")
FRACTIONS = ("objective.fully_masked_fraction", "drafter.sampled_share")
"""Settings between 0 and 1, both included."""


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
"""Settings, by the beginning of their name, and the ones without all of which nothing reads them."""
_READ = ("dist.nccl_communicator_config_path", "dataset.dataloader_load")
"""Files that a run reads besides its own."""


def problems(config: "TriModeConfig") -> list[str]:
    """Return the settings with an unknown choice or a value out of range, one line each."""
    sections = ("objective", "drafter", "diagnostics", "evaluation")
    return [
        *(line for name in sections for line in section_problems(name, getattr(config, name))),
        *resilience_problems(config.resilience),
        *_bridge_choices(config),
        *_bridge_refusals(config),
    ]


def size_problems(config: "TriModeConfig") -> list[str]:
    """Return the sizes that are too small for other rules to be computed, one line each."""
    return list(_too_small(SIZES, {key: getattr(config, key.partition(".")[0]) for key in SIZES}))


def check_sizes(config: "TriModeConfig") -> None:
    """Refuse sizes that nothing can be computed with.

    Raises:
        UserError: One line with all of them.
    """
    if lines := size_problems(config):
        raise UserError("; ".join(lines))


def section_problems(name: str, section: object | None) -> list[str]:
    """Return the fields of one section with an unknown choice or a value out of range.

    Args:
        name: Name of the section in the configuration.
        section: A dataclass of this project's; None if the configuration has none.
    """
    return [] if section is None else [*_unknown_choices(name, section), *_out_of_range(name, section)]


def resilience_problems(settings: ResilienceConfig) -> list[str]:
    """Return what is wrong with the reactions to faults, one line each."""
    lines = section_problems("resilience", settings)
    if 0 < settings.spike_factor <= 1:
        lines.append(f"resilience.spike_factor is {settings.spike_factor}; use a factor above 1, or 0 for none")
    return lines


def _unknown_choices(name: str, section: object) -> Iterator[str]:
    for field in fields(section):  # type: ignore[arg-type]
        value, choices = getattr(section, field.name), get_args(field.type)
        if get_origin(field.type) is Literal and value not in choices:
            known = "', '".join(choices)
            yield f"{name}.{field.name} is '{value}'; use '{known}'.{nearest(str(value), choices)}"


def _out_of_range(name: str, section: object) -> Iterator[str]:
    yield from _too_small(AT_LEAST, {key: section for key in AT_LEAST if key.startswith(f"{name}.")})
    for key in (*ABOVE_ZERO, *FRACTIONS):
        owner, _, field = key.partition(".")
        value = getattr(section, field) if owner == name else None
        if value is None:
            continue
        if key in ABOVE_ZERO and not value > 0:
            yield f"{key} is {value}; use a number above 0"
        if key in FRACTIONS and not 0 <= value <= 1:
            yield f"{key} is {value}; use a number from 0 to 1"


def _too_small(limits: dict[str, int], owners: dict[str, object]) -> Iterator[str]:
    """Yield a line per setting below its limit; unset ones are left out."""
    for key, owner in owners.items():
        value = getattr(owner, key.partition(".")[2])
        if value is not None and not limits[key] <= value < math.inf:
            yield f"{key} is {value}; use {limits[key]} or more"


def _bridge_choices(config: "TriModeConfig") -> Iterator[str]:
    if config.train.rampup_batch_size is not None:
        yield "train.rampup_batch_size has no effect: Megatron-Core no longer ramps batches up; leave it out"
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
