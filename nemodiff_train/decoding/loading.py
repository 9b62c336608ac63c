"""A trained model, ready to decode."""

import os
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch._C._distributed_c10d import HashStore

from nemodiff_train.errors import UserError


def load_for_decoding(checkpoint: str, tensor_parallel: int = 1) -> Any:
    """Load a Megatron checkpoint of this project for decoding, resharded as asked.

    Args:
        checkpoint: A folder of ``iter_*`` (the newest is taken) or one of them.
        tensor_parallel: Ranks that share the model; the whole gang.

    Returns:
        The Megatron GPT model in evaluation mode.

    Raises:
        UserError: It is no checkpoint, or the gang does not fit.
    """
    from megatron.bridge.training.model_load_save import build_and_load_model

    from nemodiff_train.model.pretrained import newest_iteration

    provider = open_checkpoint(checkpoint)
    start_model_parallel(tensor_parallel)
    as_one_stage(provider, tensor_parallel)
    models = build_and_load_model(str(newest_iteration(Path(checkpoint))), provider)
    model = models[0] if isinstance(models, list) else models
    return model.eval()


def open_checkpoint(checkpoint: str) -> Any:
    """The configuration of a Megatron checkpoint of this project, without its weights.

    Raises:
        UserError: It is no such checkpoint.
    """
    from nemodiff_train.model.pretrained import is_megatron_checkpoint, model_from

    if not is_megatron_checkpoint(Path(checkpoint)):
        raise UserError(f"'{checkpoint}' is no Megatron checkpoint; make one with 'nemodiff convert import'")
    return model_from(checkpoint)


def as_one_stage(provider: Any, tensor_parallel: int = 1) -> None:
    """Lay a model out for decoding or conversion: no pipeline, no training-only settings."""
    from nemodiff_train.host import prepare
    from nemodiff_train.model.provider import run_without_fusions

    provider.tensor_model_parallel_size = tensor_parallel
    provider.pipeline_model_parallel_size = provider.context_parallel_size = 1
    provider.virtual_pipeline_model_parallel_size = None
    provider.sequence_parallel = provider.perform_initialization = False
    if not prepare().cuda:
        provider.use_cpu_initialization = True
        run_without_fusions(provider)


def start_model_parallel(tensor_parallel: int) -> None:
    """Join the gang that torchrun started, or be one process alone.

    Raises:
        UserError: The gang's size is not ``tensor_parallel``.
    """
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    from nemodiff_train.host import prepare

    if parallel_state.model_parallel_is_initialized():
        return
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world != tensor_parallel:
        raise UserError(f"{world} processes were started for --tensor-parallel {tensor_parallel}; make them equal")
    if not dist.is_initialized() and world == 1:
        dist.init_process_group(prepare().backend, store=HashStore(), rank=0, world_size=1)
    elif not dist.is_initialized():
        dist.init_process_group(prepare().backend)
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=tensor_parallel)
    model_parallel_cuda_manual_seed(1234)
