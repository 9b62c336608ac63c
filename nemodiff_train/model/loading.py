"""A trained model, ready to decode."""

import os
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch._C._distributed_c10d import HashStore

from nemodiff_train.console import console, quiet
from nemodiff_train.data.tokenizer import load_tokenizer
from nemodiff_train.decoding.decode import check_mode
from nemodiff_train.decoding.generation import DecodingSettings
from nemodiff_train.errors import UserError
from nemodiff_train.model.checkpoint import Checkpoint, Kind
from nemodiff_train.runtime.patches import halves_joined_in_place


@dataclass(frozen=True)
class LoadedModel:
    """All that decoding needs of a checkpoint."""

    model: list[Any]
    """Megatron GPT model in evaluation mode: this pipeline rank's chunks, one without a pipeline."""
    tokenizer: Any
    """Its Hugging Face tokenizer."""
    settings: DecodingSettings


def load_model(
    checkpoint: Checkpoint,
    *,
    modes: tuple[str, ...] = (),
    block_size: int | None = None,
    tensor_parallel: int = 1,
    pipeline_parallel: int = 1,
    drafter: Checkpoint | None = None,
    **settings: Any,
) -> LoadedModel:
    """Open a Megatron checkpoint of this project for decoding.

    Args:
        checkpoint: A model's; where its bytes are damaged, the newest older one that is intact is taken.
        modes: Modes that are going to be used; refused here if the model cannot decode in them.
        block_size: Positions of a block; None for what it was trained with.
        tensor_parallel: Ranks that share each layer.
        pipeline_parallel: Ranks that share the layers out. A gang of more ranks splits the prompts.
        drafter: Checkpoint of a drafter that was trained for this model; it drafts in linear self-speculation.
        settings: Further fields of :class:`~nemodiff_train.decoding.generation.DecodingSettings`.

    Raises:
        UserError: No checkpoint, a mode it cannot decode in, settings that cannot be, or another model's drafter.
    """
    provider = model_of(checkpoint)
    for mode in modes:
        check_mode(provider, mode)
    if drafter is not None:
        from nemodiff_train.model.draft_adapter import load_drafter, open_drafter

        if modes and "linear" not in modes:
            raise UserError(f"--drafter acts in mode linear alone, not in {', '.join(modes)}; leave it out")
        lora = open_drafter(drafter, provider)
    tokenizer = load_tokenizer(str(checkpoint.tokenizer_directory))
    chosen = DecodingSettings(
        block_size=provider.block_size if block_size is None else block_size,
        stop_token_ids=stop_tokens(provider, tokenizer),
        detokenize=lambda tokens: str(tokenizer.decode(tokens, skip_special_tokens=True)),
        **settings,
    )
    with quiet(), console.status(f"loading {checkpoint.path}"):
        models = load_for_decoding(checkpoint, tensor_parallel, pipeline_parallel)
        if drafter is not None:
            load_drafter(models, drafter, lora)
        return LoadedModel(models, tokenizer, chosen)


def stop_tokens(provider: Any, tokenizer: Any) -> frozenset[int]:
    """Tokens that end an answer: the tokenizer's, and those the model's configuration names."""
    from nemodiff_train.model.pretrained import config_from

    found = {tokenizer.eos_token_id}
    for source in (config_from(provider.hf_config).to_dict(), provider.hf_generation_config):
        named = source.get("eos_token_id")
        found.update(named if isinstance(named, list) else [named])
    return frozenset(token for token in found if token is not None)


def load_for_decoding(checkpoint: Checkpoint, tensor_parallel: int = 1, pipeline_parallel: int = 1) -> list[Any]:
    """Load a Megatron checkpoint of this project for decoding, resharded as asked.

    Args:
        checkpoint: A model's; every byte of it is verified.
        tensor_parallel: Ranks that share each layer.
        pipeline_parallel: Ranks that share the layers out.

    Returns:
        The Megatron GPT model in evaluation mode: this pipeline rank's chunks.

    Raises:
        UserError: It is no checkpoint, none is whole, or the gang does not fit.
    """
    from megatron.bridge.training.model_load_save import build_and_load_model

    from nemodiff_train.model.adapters import merge_adapters

    provider = model_of(checkpoint)
    checkpoint = checkpoint.verify_contents()
    weights = checkpoint.base.verify_contents() if checkpoint.kind is Kind.LORA else checkpoint
    start_model_parallel(tensor_parallel, pipeline_parallel)
    set_parallelism(provider, tensor_parallel, pipeline_parallel)
    with halves_joined_in_place():
        built = build_and_load_model(str(weights.iteration.absolute()), provider)
    models = built if isinstance(built, list) else [built]
    if weights is not checkpoint:
        merge_adapters(models, checkpoint)
    return [model.eval() for model in models]


def model_of(checkpoint: Checkpoint) -> Any:
    """Return the configuration of a checkpoint's model, without its weights.

    Raises:
        UserError: It is a drafter, or no model of this project.
    """
    from nemodiff_train.model.pretrained import model_from

    return model_from(checkpoint.require_model())


def set_parallelism(provider: Any, tensor_parallel: int = 1, pipeline_parallel: int = 1) -> None:
    """Lay a model out for decoding or conversion, without training-only settings."""
    from megatron.core.extensions.transformer_engine import HAVE_TE

    from nemodiff_train.model.provider import disable_fused_kernels
    from nemodiff_train.runtime import init_runtime

    provider.tensor_model_parallel_size = tensor_parallel
    provider.pipeline_model_parallel_size = pipeline_parallel
    provider.context_parallel_size = 1
    provider.virtual_pipeline_model_parallel_size = None
    provider.sequence_parallel = provider.perform_initialization = False
    if not init_runtime().cuda:
        provider.use_cpu_initialization = True
    if not HAVE_TE:
        disable_fused_kernels(provider)


def start_model_parallel(tensor_parallel: int, pipeline_parallel: int = 1) -> None:
    """Join the gang that torchrun started, or be one process alone.

    Raises:
        UserError: The gang's size is not a multiple of the ranks that share a model.
    """
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    from nemodiff_train.runtime import init_runtime

    if parallel_state.model_parallel_is_initialized():
        return
    world = int(os.environ.get("WORLD_SIZE", "1"))
    ranks = tensor_parallel * pipeline_parallel
    if world % ranks:
        raise UserError(
            f"{world} processes were started, but this takes a multiple of {ranks} "
            f"(--tensor-parallel {tensor_parallel} x --pipeline-parallel {pipeline_parallel})"
        )
    if not dist.is_initialized() and world == 1:
        dist.init_process_group(init_runtime().backend, store=HashStore(), rank=0, world_size=1)
    elif not dist.is_initialized():
        dist.init_process_group(init_runtime().backend)
    parallel_state.initialize_model_parallel(tensor_parallel, pipeline_parallel)
    model_parallel_cuda_manual_seed(1234)
