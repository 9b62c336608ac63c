"""``nemodiff train RECIPE --dry-run``: everything a run needs, looked at on any machine."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from rich.console import Console
from rich.table import Table

from nemodiff_train.config.config import TriModeConfig
from nemodiff_train.console import quiet
from nemodiff_train.errors import UserError
from nemodiff_train.validation.checks import problems
from nemodiff_train.validation.layout import layout_problems

GB = 1e9
_GRADIENT = 4
"""Bytes a trained parameter: its gradient in fp32."""
_OPTIMIZER = {True: 12, False: 8}
"""Bytes a trained parameter: Adam's two moments, and with mixed precision the weight in fp32."""


def preflight(config: TriModeConfig, gpus: int | None, gpu_memory: float) -> int:
    """Check a run without starting it, and print one page.

    Args:
        gpus: Processes of the run; None for one replica of its layout.
        gpu_memory: GB (1e9 bytes) of one GPU.

    Returns:
        0 if nothing was found, else 2.
    """
    model = config.model
    replica = model.tensor_model_parallel_size * model.pipeline_model_parallel_size * model.context_parallel_size
    world_size = gpus or replica
    found = list(problems(config, world_size))
    page = Table("", "", title="Dry run", show_header=False)
    page.add_row("processes", f"{world_size}, {world_size // replica} replicas of {replica}")
    page.add_row(
        "tokens", f"{config.train.train_iters * _step_tokens(config):,} in {config.train.train_iters:,} steps"
    )
    if not layout_problems(config, world_size):
        found += _size_up(config, world_size, gpu_memory, page)
    for number, problem in enumerate(found, start=1):
        page.add_row(f"[red]problem {number}[/red]", problem)
    page.add_row("result", f"[red]{len(found)} problems[/red]" if found else "[green]ready[/green]")
    Console().print(page)
    return 2 if found else 0


def _step_tokens(config: TriModeConfig) -> int:
    return int(config.train.global_batch_size * config.dataset.seq_length)


def _size_up(config: TriModeConfig, world_size: int, gpu_memory: float, page: Table) -> Iterator[str]:
    """Build every pipeline stage on the meta device; what does not fit, a line each."""
    model = config.model
    try:
        config.propagate()
    except UserError:
        model.mask_token_id = None  # already among the problems; the shapes do not depend on it
    stages = _stages(config, world_size)
    mixed = config.mixed_precision is not None
    sharded = bool(config.optimizer.use_distributed_optimizer)
    replicas = world_size // (model.tensor_model_parallel_size * len(stages)) if sharded else 1
    needed = max(stage.bytes(mixed, replicas) for stage in stages) / GB
    largest = max(stages, key=lambda stage: stage.parameters)
    page.add_row("parameters of a GPU", f"{largest.parameters:,} on the largest of {len(stages)} stages")
    if config.peft:
        page.add_row("of them trained", f"{max(stage.trained for stage in stages):,} in adapters, the rest is frozen")
    page.add_row("memory of a GPU", f"{needed:.1f} GB of {gpu_memory:g} GB, before activations")
    if needed > gpu_memory:
        yield (
            f"weights, gradients and optimizer state take {needed:.1f} GB of a GPU, which has {gpu_memory:g} GB; "
            "raise model.tensor_model_parallel_size or model.pipeline_model_parallel_size, or use more GPUs"
        )
    # A few replicated rows too many.
    whole = sum(stage.trained for stage in stages) * model.tensor_model_parallel_size
    each = whole * (_OPTIMIZER[mixed] + (2 if mixed else 4)) / GB
    count = _checkpoints_at_once(config)
    folder = Path(config.checkpoint.save).absolute()
    there = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(there).free / GB
    page.add_row("disk", f"{count} checkpoints of {each:.1f} GB; {free:.1f} GB free at {there}")
    if count * each > free:
        yield (
            f"checkpoint.save={config.checkpoint.save} has {free:.1f} GB free, but {count} checkpoints take "
            f"{count * each:.1f} GB; set checkpoint.most_recent_k, or name another output"
        )


def _checkpoints_at_once(config: TriModeConfig) -> int:
    """Checkpoints that lie in the folder together, with the one being written."""
    made = -(-config.train.train_iters // config.checkpoint.save_interval)
    kept = config.checkpoint.most_recent_k
    return int(made if kept < 1 else min(made, kept + 1))


@dataclass(frozen=True)
class _Stage:
    """What a pipeline stage's GPU holds."""

    parameters: int
    trained: int
    """Those with gradients and optimizer state: with adapters, those alone."""

    def bytes(self, mixed: bool, replicas: int) -> float:
        """Weights, gradients and optimizer state."""
        width = 2 if mixed else 4
        return self.parameters * width + self.trained * (_GRADIENT + _OPTIMIZER[mixed] / replicas)


def _stages(config: TriModeConfig, world_size: int) -> list[_Stage]:
    """The first tensor-parallel rank of every pipeline stage, over its model chunks."""
    stages = config.model.pipeline_model_parallel_size
    return [_stage(config, world_size, stage * (world_size // stages)) for stage in range(stages)]


def _stage(config: TriModeConfig, world_size: int, rank: int) -> _Stage:
    with quiet(), _as_rank(config, world_size, rank):
        config.model.finalize()
        config.model.use_cpu_initialization = False
        config.model.perform_initialization = False
        chunks = config.model.provide_distributed_model(wrap_with_ddp=False, init_model_with_meta_device=True)
        if config.peft:
            with torch.device("meta"):
                config.peft(chunks)
        found = [parameter for chunk in chunks for parameter in chunk.parameters()]
        trained = (parameter for parameter in found if parameter.requires_grad)
        return _Stage(sum(each.numel() for each in found), sum(each.numel() for each in trained))


@contextmanager
def _as_rank(config: TriModeConfig, world_size: int, rank: int) -> Iterator[None]:
    """Be one rank of a world whose other processes do not exist: torch's fake backend sends nothing."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=config.model.tensor_model_parallel_size,
            pipeline_model_parallel_size=config.model.pipeline_model_parallel_size,
            virtual_pipeline_model_parallel_size=config.model.virtual_pipeline_model_parallel_size,
            context_parallel_size=config.model.context_parallel_size,
            create_gloo_process_groups=False,
        )
        model_parallel_cuda_manual_seed(1)  # adapters are made under Megatron's random state, even without values
        yield
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
