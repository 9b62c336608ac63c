"""Load a Megatron checkpoint for decoding, comparison or export, under any layout."""

from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from megatron.bridge.training.model_load_save import build_and_load_model
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from rich.text import Text
from torch._C._distributed_c10d import HashStore
from transformers import PreTrainedTokenizerBase

from nemodiff_train.console import console, quiet, warn
from nemodiff_train.data.tokenizer import load_tokenizer, tokens_beyond_vocabulary
from nemodiff_train.distributed import local_rank, world_size
from nemodiff_train.errors import UserError
from nemodiff_train.model.adapters import merge_adapters
from nemodiff_train.model.checkpoint import Checkpoint, Kind
from nemodiff_train.model.checksums import identity
from nemodiff_train.model.draft_adapter import load_drafter, open_drafter
from nemodiff_train.model.pretrained import config_from, model_from
from nemodiff_train.model.provider import TriModeModelProvider, fit_to_host
from nemodiff_train.runtime import init_runtime
from nemodiff_train.runtime.patches import merge_gate_and_up_in_place

_LONGEST_WAIT = timedelta(hours=6)
"""Timeout of a collective: replicas that decode prompts of different lengths wait for each other at the end."""


@dataclass(frozen=True)
class LoadedModel:
    """A checkpoint in memory."""

    provider: TriModeModelProvider
    """Configuration of the model."""
    chunks: list[GPTModel]
    """The model in evaluation mode: this pipeline rank's chunks, one without a pipeline."""
    tokenizer: PreTrainedTokenizerBase


def load_model(
    checkpoint: Checkpoint,
    *,
    provider: TriModeModelProvider | None = None,
    tensor_parallel: int = 1,
    pipeline_parallel: int = 1,
    drafter: Checkpoint | None = None,
    dtype: torch.dtype | None = None,
) -> LoadedModel:
    """Load a checkpoint of this project, resharded as asked.

    Args:
        checkpoint: A model's, or one of LoRA. Every byte is verified; where it is damaged, the newest older one that
            is intact is loaded.
        provider: What :func:`~nemodiff_train.model.pretrained.model_from` has returned for it; None to ask for it.
        tensor_parallel: Ranks that share each layer.
        pipeline_parallel: Ranks that share the layers out; where there are more ranks, they hold replicas.
        drafter: A drafter that was trained for this model.
        dtype: Of the weights in memory; None for that of the checkpoint.

    Raises:
        UserError: It is a drafter, no iteration is intact, the layout does not fit the world size, or the drafter is
            one of another model.
    """
    if provider is None:
        provider = model_from(checkpoint.require_model())
    drafter = drafter.require_drafter().verify_contents() if drafter else None
    drafter_settings = open_drafter(drafter, provider) if drafter else None
    tokenizer = load_tokenizer(str(checkpoint.tokenizer_directory))
    with console.status(Text(f"verifying {checkpoint.path}")):
        verified = checkpoint.verify_contents()
    if verified is not checkpoint:  # all of the above once more, of the older iteration
        layout: dict[str, Any] = {"tensor_parallel": tensor_parallel, "pipeline_parallel": pipeline_parallel}
        return load_model(verified, **layout, drafter=drafter, dtype=dtype)
    if line := tokens_beyond_vocabulary(tokenizer, provider.vocab_size):
        warn(line)
    with quiet(), console.status(Text(f"loading {checkpoint.path}")):
        weights = checkpoint.base if checkpoint.kind is Kind.LORA else checkpoint
        start_model_parallel(tensor_parallel, pipeline_parallel)
        set_parallelism(provider, tensor_parallel, pipeline_parallel)
        set_dtype(provider, dtype or provider.params_dtype)
        with merge_gate_and_up_in_place():
            built: Any = build_and_load_model(str(weights.iteration.absolute()), provider)
        chunks: list[GPTModel] = built if isinstance(built, list) else [built]
        if weights is not checkpoint:
            merge_adapters(chunks, checkpoint)
        if drafter and drafter_settings:
            warn_of_other_base(drafter, weights)
            load_drafter(chunks, drafter, drafter_settings)
    return LoadedModel(provider, [chunk.eval() for chunk in chunks], tokenizer)


def warn_of_other_base(drafter: Checkpoint, weights: Checkpoint) -> None:
    """Warn of a drafter that was trained on other weights: the text stays right, with fewer tokens per forward."""
    base = drafter.run_config.get("adapter_base") or {}
    if base.get("checksum") != identity(weights.iteration):
        line = f"'{drafter.path}' was trained for {base.get('iteration')}, not for '{weights.iteration}'"
        warn(f"{line}; it may draft worse")


def computing_dtype() -> torch.dtype | None:
    """Return the dtype to decode in: fp32 on a CPU, where 16 bits are slow; else None, for that of the checkpoint."""
    return None if init_runtime().cuda else torch.float32


def set_dtype(provider: TriModeModelProvider, dtype: torch.dtype) -> None:
    """Set the dtype of a model's weights and activations."""
    provider.params_dtype = provider.pipeline_dtype = dtype
    provider.bf16, provider.fp16 = dtype == torch.bfloat16, dtype == torch.float16


def stop_tokens(provider: TriModeModelProvider, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Return the ids that end an answer: the tokenizer's, and those that the model's configuration names."""
    ids = {tokenizer.eos_token_id}
    for settings in (config_from(provider.hf_config).to_dict(), provider.hf_generation_config):
        named = settings.get("eos_token_id")
        ids.update(named if isinstance(named, list) else [named])
    return frozenset(token for token in ids if token is not None)


def set_parallelism(provider: TriModeModelProvider, tensor_parallel: int = 1, pipeline_parallel: int = 1) -> None:
    """Set the layout of a model for decoding or conversion, without what only training needs."""
    provider.tensor_model_parallel_size = tensor_parallel
    provider.pipeline_model_parallel_size = pipeline_parallel
    provider.context_parallel_size = 1
    provider.virtual_pipeline_model_parallel_size = None
    provider.sequence_parallel = provider.perform_initialization = False
    if not init_runtime().cuda:
        provider.use_cpu_initialization = True
    fit_to_host(provider)
    provider.transformer_impl = "local"  # the same on every machine, to the bit
    provider.gradient_accumulation_fusion = False  # adds to buffers that only training has
    # FP8 takes a multiple of 8 tokens, and a decoded row is one.
    provider.fp8 = provider.fp4 = None
    provider.fp8_param = False


def start_model_parallel(tensor_parallel: int, pipeline_parallel: int = 1) -> None:
    """Join the ranks that torchrun started, or be a world of one; does nothing where Megatron's groups exist.

    Raises:
        UserError: The world size is not a multiple of the ranks that share a model.
    """
    if parallel_state.model_parallel_is_initialized():
        return
    world = world_size()
    ranks = tensor_parallel * pipeline_parallel
    if world % ranks:
        raise UserError(
            f"{world} processes were started, but this takes a multiple of {ranks} "
            f"(--tensor-parallel {tensor_parallel} x --pipeline-parallel {pipeline_parallel})"
        )
    if init_runtime().cuda:
        torch.cuda.set_device(local_rank())  # NCCL takes the device of this moment
    if not dist.is_initialized() and world == 1:  # without a launcher, which would name a port
        dist.init_process_group(init_runtime().backend, store=HashStore(), rank=0, world_size=1)
    elif not dist.is_initialized():
        dist.init_process_group(init_runtime().backend, timeout=_LONGEST_WAIT)
    parallel_state.initialize_model_parallel(tensor_parallel, pipeline_parallel)
    model_parallel_cuda_manual_seed(1234)
