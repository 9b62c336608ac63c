"""Load a model together with the settings that it decodes with."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from transformers import PreTrainedTokenizerBase

from nemodiff_train.console import warn
from nemodiff_train.decoding.decode import DRAFTED, WITHOUT_POLICY, check_mode
from nemodiff_train.decoding.generation import DecodingSettings
from nemodiff_train.errors import UserError
from nemodiff_train.model.checkpoint import Checkpoint
from nemodiff_train.model.checksums import identity
from nemodiff_train.model.draft_adapter import open_drafter
from nemodiff_train.model.loading import computing_dtype, load_model, stop_tokens
from nemodiff_train.model.pretrained import model_from
from nemodiff_train.model.provider import TriModeModelProvider
from nemodiff_train.objective.drafts import DRAFT_KINDS
from nemodiff_train.sampler.description import check_sampler
from nemodiff_train.sampler.storage import TrainedSampler, read_sampler

_NOT_APPLIED = {
    "repetition_penalty": 1.0, "encoder_repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "min_length": 0,
    "min_new_tokens": 0, "num_beams": 1, "penalty_alpha": 0, "guidance_scale": 1.0, "bad_words_ids": None,
    "sequence_bias": None, "suppress_tokens": None, "begin_suppress_tokens": None, "forced_bos_token_id": None,
    "forced_eos_token_id": None, "exponential_decay_length_penalty": None, "stop_strings": None,
}  # fmt: skip
"""Keys of a generation_config.json that change what greedy decoding writes, with the value that changes nothing."""


@dataclass(frozen=True)
class DecodingModel:
    """A model, and how it decodes."""

    model: list[GPTModel]
    """In evaluation mode: this pipeline rank's chunks, one without a pipeline."""
    tokenizer: PreTrainedTokenizerBase
    settings: DecodingSettings

    @property
    def config(self) -> TriModeModelProvider:
        """Return the configuration of the model, the same on every rank."""
        config: TriModeModelProvider = self.model[0].config
        return config

    @property
    def device(self) -> torch.device:
        """Return the device of the weights."""
        return next(self.model[0].parameters()).device


def select_mode(checkpoint: Checkpoint, drafter: Checkpoint | None, mode: str | None) -> str:
    """Return the named mode, or by default the one that writes what AR decoding would in the fewest forwards.

    Args:
        checkpoint: A model's.
        drafter: A drafter that was trained for this model.
        mode: Name of a mode; None for ``linear`` where the model or its drafter can draft, else ``ar``.

    Raises:
        UserError: The model cannot decode in the mode.
    """
    provider = model_from(checkpoint.require_model())
    kind = open_drafter(drafter, provider).kind if drafter else DRAFT_KINDS["nemotron"]
    if mode is None:
        mode = "linear" if provider.mask_token_id is not None or kind.uniform_noise else "ar"
    check_mode(provider, mode, kind)
    return mode


def load_decoding_model(
    checkpoint: Checkpoint,
    *,
    modes: tuple[str, ...] = (),
    block_size: int | None = None,
    tensor_parallel: int = 1,
    pipeline_parallel: int = 1,
    drafter: Checkpoint | None = None,
    sampler: str | None = None,
    **settings: Any,
) -> DecodingModel:
    """Load a checkpoint of this project for decoding; settings are refused before any weight is read.

    Args:
        checkpoint: A model's.
        modes: Modes that are going to be used.
        block_size: Positions per block; None for what the model was trained with, or its ``uno`` drafter.
        tensor_parallel: Ranks that share each layer.
        pipeline_parallel: Ranks that share the layers out; where there are more ranks, replicas share the prompts.
        drafter: A drafter that was trained for this model; it drafts in linear and tree self-speculation.
        sampler: Folder of a trained sampler, for ``policy=trained``: its block size and threshold are the defaults.
        settings: Further fields of :class:`~nemodiff_train.decoding.generation.DecodingSettings`.

    Raises:
        UserError: The model cannot decode in a mode, a setting is out of its range, or as
            :func:`~nemodiff_train.model.loading.load_model`.
    """
    provider = model_from(checkpoint.require_model())
    drafter_settings = open_drafter(drafter, provider) if drafter else None
    for mode in modes:
        check_mode(provider, mode, *([drafter_settings.kind] if drafter_settings else []))
    if drafter is not None and modes and not set(DRAFTED) & set(modes):
        raise UserError(f"--drafter acts in modes linear and tree, not in {', '.join(modes)}; leave it out")
    if sampler is not None and modes and set(modes) <= set(WITHOUT_POLICY):
        raise UserError(f"--policy trained decides in mode diffusion, not in {', '.join(modes)}; leave it out")
    requested = provider.hf_generation_config
    ignored = [
        f"{key}={requested[key]}" for key, none in _NOT_APPLIED.items() if requested.get(key) not in (None, none)
    ]
    if ignored:
        warn(f"generation_config.json asks for {', '.join(ignored)}, which decoding here does not do")
    trained = open_sampler(checkpoint, settings.get("policy"), sampler)
    if trained is not None:
        block_size = block_size or trained.description.block_size
        settings = {"threshold": trained.description.threshold, **settings, "trained_sampler": trained}
    if block_size is None:
        block_size = provider.block_size
        if drafter_settings and not drafter_settings.kind.known_token_in_block:
            block_size = drafter_settings.block_size
    decoding = DecodingSettings(block_size=block_size, **settings)
    loaded = load_model(
        checkpoint,
        provider=provider,
        tensor_parallel=tensor_parallel,
        pipeline_parallel=pipeline_parallel,
        drafter=drafter,
        dtype=computing_dtype(),
    )
    settled = for_tokenizer(decoding, loaded.provider, loaded.tokenizer)
    decoding_model = DecodingModel(loaded.chunks, loaded.tokenizer, settled)
    if trained is not None:
        trained.network.to(decoding_model.device)
    return decoding_model


def open_sampler(checkpoint: Checkpoint, policy: str | None, folder: str | None) -> TrainedSampler | None:
    """Read the trained sampler that a policy decides with; None for the policies that need none.

    One that was trained for other weights is taken, with a warning: it may be wrong more often than it says.

    Raises:
        UserError: There is a sampler without the policy or the reverse, or it cannot be used.
    """
    check_sampler(policy, folder)
    if folder is None:
        return None
    trained = read_sampler(Path(folder))
    if trained.description.checksum != identity(checkpoint.iteration):
        line = f"'{folder}' was trained for {trained.description.checkpoint}, not for '{checkpoint.iteration}'"
        warn(f"{line}; it may be wrong more often")
    return trained


def for_tokenizer(
    settings: DecodingSettings, provider: TriModeModelProvider, tokenizer: PreTrainedTokenizerBase
) -> DecodingSettings:
    """Return settings that know how a model's answers end, and how its tokens read."""
    return replace(
        settings,
        stop_token_ids=stop_tokens(provider, tokenizer),
        detokenize=lambda tokens: str(tokenizer.decode(tokens, skip_special_tokens=True)),
        detokenize_with_special=lambda tokens: str(tokenizer.decode(tokens, skip_special_tokens=False)),
    )
