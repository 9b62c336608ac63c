"""Check the set-up of a run in one process: its model in miniature, its optimizer, its data."""

import copy
import math
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.bridge.data.base import DatasetBuildContext
from megatron.bridge.data.loaders import get_train_valid_test_num_samples
from megatron.bridge.data.samplers import build_pretraining_data_loader
from megatron.bridge.training.config import runtime_config_update
from megatron.bridge.training.optim import setup_optimizer
from megatron.bridge.training.tokenizers.tokenizer import build_tokenizer
from megatron.core import parallel_state
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from torch.testing._internal.distributed.fake_pg import FakeStore

from nemodiff_train.config.config import TriModeConfig
from nemodiff_train.config.precision import precision_of
from nemodiff_train.console import quiet
from nemodiff_train.errors import UserError
from nemodiff_train.runtime import init_runtime

_WIDTH = 16
"""Hidden size of the miniature on a tensor-parallel rank."""
_FEW_SAMPLES = 1 << 12
"""Largest data set of the rehearsal: to order a run's samples, over many epochs of little data, takes minutes."""


def problems(config: TriModeConfig, world_size: int) -> list[str]:
    """Return what would end a run before its first step, or nothing.

    The miniature has the run's settings and layers, but narrow ones: what Megatron refuses to build depends on the
    settings and not on the width.

    Args:
        config: A run that the other rules accept; it is not changed.
        world_size: Number of processes.
    """
    trial = copy.deepcopy(config)
    trial.mixed_precision = precision_of(trial, init_runtime().cuda)
    steps: dict[str, Callable[[TriModeConfig], object]] = {
        "Bridge refuses the configuration": runtime_config_update,
        "Megatron cannot build the model and its optimizer": _build,
        "the data cannot be loaded": _load_batch,
    }
    with quiet(), as_rank(config, world_size, 0):
        return next(filter(None, (failures(failure, partial(step, trial)) for failure, step in steps.items())), [])


def failures(what: str, call: Callable[[], object]) -> list[str]:
    """Return one line for whatever ends a call, since Megatron and Bridge refuse by any exception; else nothing."""
    try:
        call()
    except UserError as error:
        return [str(error)]
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        reason = next(iter(str(error).strip().splitlines()), f"{frame.line} ({frame.filename}:{frame.lineno})")
        return [f"{what}: {type(error).__name__}: {reason}"]
    return []


def _build(config: TriModeConfig) -> None:
    """Build a miniature of the model with its optimizer and its schedule."""
    model = config.model
    model.hidden_size = model.ffn_hidden_size = _WIDTH * model.tensor_model_parallel_size
    model.kv_channels, model.perform_initialization = 8, False
    model.finalize()
    optimizer: Any = config.optimizer
    chunks = model.provide_distributed_model(
        ddp_config=config.ddp,
        use_megatron_fsdp=config.dist.use_megatron_fsdp,
        use_torch_fsdp2=config.dist.use_torch_fsdp2,
        overlap_param_gather_with_optimizer_step=optimizer.overlap_param_gather_with_optimizer_step,
        data_parallel_random_init=config.rng.data_parallel_random_init,
        pre_wrap_hook=config.peft,
    )
    setup_optimizer(
        optimizer,
        config.scheduler,
        chunks,
        optimizer_config_override_provider=config.optimizer_config_override_provider,
    )


def _load_batch(config: TriModeConfig) -> None:
    """Read a micro-batch as the first rank's loader does."""
    with datasets(config, max(_FEW_SAMPLES, config.train.global_batch_size)) as (train, *_):
        loader = build_pretraining_data_loader(
            train,
            0,
            config.dataset.dataloader_type,
            config.train.micro_batch_size,
            0,
            config.dataset.data_sharding,
            global_batch_size=config.train.global_batch_size,
        )
        next(iter(loader))


@contextmanager
def datasets(config: TriModeConfig, most: float = math.inf) -> Iterator[tuple[Any, ...]]:
    """Build the data sets of a run.

    The run's folder is not made, but what it has there is used.

    Args:
        config: After :meth:`TriModeConfig.propagate`.
        most: Samples of each data set; fewer than the run's come in another order.

    Yields:
        The training, validation and test set; None for one without samples.
    """
    dataset, sizes = config.dataset, get_train_valid_test_num_samples(config)
    with tempfile.TemporaryDirectory() as folder:
        if max(sizes) > most or not Path(dataset.index_folder).is_dir():
            dataset.index_folder = folder
        sizes = [min(size, most) for size in sizes]
        yield tuple(dataset.build_datasets(DatasetBuildContext(*sizes, tokenizer=build_tokenizer(config.tokenizer))))


@contextmanager
def as_rank(config: TriModeConfig, world_size: int, rank: int) -> Iterator[None]:
    """Act as one rank of a world without the other processes: torch's fake backend sends nothing."""
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
