"""``nemodiff train RECIPE --dry-run``: check everything that a run needs on any machine, and print one page."""

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from rich.table import Column, Table
from rich.text import Text
from torch.overrides import TorchFunctionMode

from nemodiff_train.config.config import Changes, TriModeConfig, differences, flattened
from nemodiff_train.config.precision import is_mixed, precision_of
from nemodiff_train.console import PlainConsole, quiet
from nemodiff_train.errors import UserError
from nemodiff_train.planning import rules
from nemodiff_train.planning.hardware import USABLE_MEMORY
from nemodiff_train.planning.layouts import layout_of
from nemodiff_train.planning.memory import Stage, optimizer_bytes, stage_memory
from nemodiff_train.planning.workload import workload_of
from nemodiff_train.runtime.memory import GB
from nemodiff_train.validation import rehearsal
from nemodiff_train.validation.check import problems
from nemodiff_train.validation.rehearsal import as_rank, failures
from nemodiff_train.validation.resume import description
from nemodiff_train.validation.settings import check_sizes


def dry_run(
    config: TriModeConfig,
    defaults: dict[str, Any],
    gpus: int | None,
    gpu_memory: float,
    known_problems: Sequence[str] = (),
) -> int:
    """Check a run without starting it, and print one page.

    Args:
        config: The run, fitted to this machine.
        defaults: The settings that its recipe has by itself, by their dotted keys.
        gpus: Number of processes; None for one replica of its layout.
        gpu_memory: Memory of one GPU in GB (1e9 bytes).
        known_problems: Problems that earlier checks have found.

    Returns:
        0 if there are no problems, else 2.

    Raises:
        UserError: A size is below its minimum, so that nothing else can be checked.
    """
    check_sizes(config)
    model = config.model
    replica = model.tensor_model_parallel_size * model.pipeline_model_parallel_size * model.context_parallel_size
    world_size = gpus or replica
    lines = [*known_problems, *problems(config, world_size)]
    failed = [] if lines else rehearsal.problems(config, world_size)
    page = Table(Column(), Column(overflow="fold"), title="Dry run", show_header=False)
    page.add_row("processes", f"{world_size}, {world_size // replica} replicas of {replica}")
    steps, tokens = config.train.train_iters, config.train.global_batch_size * config.dataset.seq_length
    page.add_row("tokens", f"{steps * tokens:,} in {steps:,} steps")
    page.add_row("precision", f"{precision_of(config, True)} on a GPU, {precision_of(config, False)} on a CPU")
    requested = config.settings()
    _add_changes(page, "not as in the recipe", differences(defaults, requested))
    _add_changes(page, "fitted to this machine", differences(requested, flattened(config.sections())))
    if config.saved:
        page.add_row("resume", description(config.saved, config))
    if not failed and not rules.problems(config, world_size):

        def measure() -> None:
            stages = build_stages(config, world_size)
            lines.extend(_memory_problems(config, world_size, stages, gpu_memory, page))
            lines.extend(_disk_problems(config, stages, page))

        failed = failures("Megatron cannot build the model", measure)
    lines += failed
    for number, line in enumerate(lines, start=1):
        page.add_row(Text(f"problem {number}", "red"), line)
    page.add_row("result", Text(f"{len(lines)} problems", "red") if lines else Text("ready", "green"))
    PlainConsole().print(page)
    return 2 if lines else 0


def _add_changes(page: Table, name: str, changes: Changes) -> None:
    """Add a row with a line per setting that differs, if one does."""
    if changes:
        page.add_row(name, "\n".join(f"{key}: {old} -> {new}" for key, (old, new) in changes.items()))


def _memory_problems(
    config: TriModeConfig, world_size: int, stages: list[Stage], gpu_memory: float, page: Table
) -> Iterator[str]:
    """Add the memory of the fullest GPU to the page, and yield a line if it does not fit."""
    work, parallel = workload_of(config), layout_of(config, world_size)
    memory = max((stage_memory(work, parallel, stage) for stage in stages), key=lambda memory: memory.total)
    largest = max(stages, key=lambda stage: stage.parameters)
    page.add_row("parameters per GPU", f"{largest.parameters:,} on the largest of {len(stages)} stages")
    if config.peft:
        trained = max(stage.trained for stage in stages)
        part = "a path selector" if work.selector_rank else "adapters"
        page.add_row("trained parameters", f"{trained:,} in {part}, the rest is frozen")
    needed, usable = memory.total / GB, USABLE_MEMORY * gpu_memory
    parts = ", ".join(f"{field.name} {getattr(memory, field.name) / GB:.2f}" for field in fields(memory))
    page.add_row("memory per GPU", f"{needed:.2f} GB of {usable:g} GB that can be used: {parts}")
    if needed > usable:
        yield (
            f"a GPU needs {needed:.2f} GB and can use {usable:g} GB of {gpu_memory:g} GB; raise "
            "model.tensor_model_parallel_size or model.pipeline_model_parallel_size, use more GPUs, or set "
            "model.recompute_granularity=full; 'nemodiff plan' finds layouts that fit"
        )


def _disk_problems(config: TriModeConfig, stages: list[Stage], page: Table) -> Iterator[str]:
    """Add the size of the checkpoints to the page, and yield a line if the disk cannot hold them."""
    mixed = is_mixed(precision_of(config, cuda=True))
    # A few rows too many: what tensor-parallel ranks replicate is saved once.
    trained = sum(stage.trained for stage in stages) * config.model.tensor_model_parallel_size
    size = trained * (optimizer_bytes(mixed) + (2 if mixed else 4)) / GB
    # The checkpoints that exist together, with the one that is being written.
    kept = config.checkpoint.most_recent_k
    count = -(-config.train.train_iters // config.checkpoint.save_interval)
    count = count if kept < 1 else min(count, kept + 1)
    folder = Path(config.checkpoint.save).absolute()
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(existing).free / GB
    page.add_row("disk", f"{count} checkpoints of {size:.1f} GB; {free:.1f} GB free at {existing}")
    if count * size > free:
        yield (
            f"checkpoint.save={config.checkpoint.save} has {free:.1f} GB free, but {count} checkpoints take "
            f"{count * size:.1f} GB; set checkpoint.most_recent_k, or name another output"
        )


class _WithoutMemory(TorchFunctionMode):
    """Makes tensors on the meta device also where Megatron names the GPU, of which a dry run would take gigabytes."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        return func(*args, **{**kwargs, "device": "meta"} if kwargs.get("device") is not None else kwargs)


def build_stages(config: TriModeConfig, world_size: int) -> list[Stage]:
    """Build the first tensor-parallel rank of every pipeline stage on the meta device, and count its parameters."""
    try:
        config.propagate()
    except UserError:
        config.model.mask_token_id = None  # already among the problems; the shapes do not depend on it
    model, stages = config.model, []
    count = model.pipeline_model_parallel_size
    for index in range(count):
        with quiet(), as_rank(config, world_size, index * (world_size // count)), _WithoutMemory():
            model.finalize()
            model.use_cpu_initialization = model.perform_initialization = False
            model.bf16 = model.fp16 = False  # the wrappers of a low precision have no parameters
            chunks = model.provide_distributed_model(wrap_with_ddp=False, init_model_with_meta_device=True)
            if config.peft:
                with torch.device("meta"):
                    config.peft(chunks)
        parameters = [parameter for chunk in chunks for parameter in chunk.parameters()]
        stage = Stage(
            index=index,
            layers=sum(len(chunk.decoder.layers) for chunk in chunks),
            parameters=sum(parameter.numel() for parameter in parameters),
            trained=sum(parameter.numel() for parameter in parameters if parameter.requires_grad),
        )
        stages.append(stage)
    return stages
