"""Configure the model of a Hugging Face directory or name, or of a Megatron checkpoint."""

import copy
import json
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

from accelerate import init_empty_weights
from huggingface_hub import metadata_load, snapshot_download
from huggingface_hub.errors import HFValidationError
from megatron.bridge.training.utils.config_utils import apply_run_config_backward_compat
from megatron.bridge.utils.instantiate_utils import InstantiationException, instantiate
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    Ministral3Config,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.initialization import no_init_weights

from nemodiff_train.console import quiet
from nemodiff_train.data.tokenizer import PATTERNS
from nemodiff_train.errors import UserError
from nemodiff_train.model.checkpoint import Checkpoint
from nemodiff_train.model.config_json import check_config, check_generation_config, read_config
from nemodiff_train.model.families import (
    NEMOTRON,
    SDAR,
    TESTED,
    TRI_MODE,
    HFConfig,
    ar_settings,
    architecture,
    diffusion_settings,
    unsupported,
)
from nemodiff_train.model.provider import TriModeModelProvider, reset_parallelism, tri_mode
from nemodiff_train.schema import check_type, read_json

NEITHER = "it has neither config.json nor iter_* folders"
REMEDY = "give a Hugging Face directory or name, or a Megatron checkpoint"


class NemotronLabsDiffusionConfig(Ministral3Config):
    """Configuration of a NemotronLabsDiffusion model."""

    model_type = "nemotron_labs_diffusion"


_CACHED = re.compile(r"models--(.+?)--(.+)")
"""Folder of a model in Hugging Face's cache."""

AutoConfig.register(NemotronLabsDiffusionConfig.model_type, NemotronLabsDiffusionConfig)


def model_from(source: str | Checkpoint) -> TriModeModelProvider:
    """Return the configuration of a checkpoint's model; the weights are loaded when it is built.

    Args:
        source: A Hugging Face directory or name, or a Megatron checkpoint of this project.

    Raises:
        UserError: There is no checkpoint, or its architecture is not supported.
    """
    if isinstance(source, Checkpoint):
        return _megatron_model(source)
    if checkpoint := Checkpoint.find(source):
        return _megatron_model(checkpoint)
    settings = stored_settings(source)
    provider = model_like(config_from(ar_settings(settings)))
    provider.hf_config = settings if architecture(settings) == NEMOTRON else ar_settings(settings)
    directory = Path(local_copy(source))
    if (generation := directory / "generation_config.json").is_file():
        provider.hf_generation_config = check_generation_config(read_json(generation), generation)
    provider.origin = _origin(source, directory)
    if diffusion := diffusion_settings(settings):
        provider.mask_token_id, provider.shift = diffusion["mask_token_id"], diffusion["shift"]
        provider.block_size = provider.largest_block = diffusion["block_size"]
        provider.clean_attention = diffusion["clean_attention"]
    if (provider.mask_token_id or 0) >= provider.vocab_size:
        raise UserError(
            f"'{source}': mask_token_id is {provider.mask_token_id}, but config.json has {provider.vocab_size} "
            "tokens; fetch config.json again"
        )
    return provider


def _origin(source: str, directory: Path) -> HFConfig:
    """Return the name of a Hugging Face model as ``base_model``, and what its own card says about the licence.

    Args:
        source: Directory or name on the hub, as the user wrote it.
        directory: Folder of its files.
    """
    cached = next((match for part in directory.absolute().parts if (match := _CACHED.fullmatch(part))), None)
    name = "/".join(cached.groups()) if cached else Path(source).resolve().name if Path(source).is_dir() else source
    try:
        card = metadata_load(directory / "README.md") or {}
    except (OSError, ValueError):  # there is none, or its head is not YAML
        card = {}
    return {"base_model": name} | {
        key: card[key] for key in ("license", "license_name", "license_link") if key in card
    }


def model_like(config: PretrainedConfig) -> TriModeModelProvider:
    """Return the configuration of a new model of the shape that a Hugging Face configuration describes.

    Raises:
        UserError: The architecture is not supported.
    """
    from nemodiff_train.model.bridges import auto_bridge  # seconds, which a Megatron checkpoint does not need

    bridge = auto_bridge(config)
    try:
        source = bridge.to_megatron_provider(load_weights=False)
    except Exception as error:  # for example an activation that Megatron lacks
        raise _unusable(architecture(config.to_dict()), error) from None
    provider = tri_mode(source, config.to_dict())
    provider.hf_config = json.loads(config.to_json_string())
    return provider


def _unusable(name: str, error: Exception) -> UserError:
    """Return the refusal of a ``config.json`` that Transformers or Bridge fails on, by whatever exception."""
    reason = " ".join(str(error).split())[:300]
    kind = "" if isinstance(error, TypeError | ValueError) else f"{type(error).__name__}: "
    return UserError(f"config.json of {name}: {kind}{reason.rstrip('.')}; correct config.json, or fetch it again")


def stored_settings(source: str) -> HFConfig:
    """Return the ``config.json`` of a Hugging Face directory or name, as it is written there.

    Raises:
        UserError: There is none, or it cannot be read.
    """
    path = Path(source)
    if path.exists() and not (path / "config.json").is_file():
        raise UserError(f"'{source}' is not a checkpoint: {NEITHER}; {REMEDY}")
    return read_config(Path(local_copy(source)))


def config_from(settings: HFConfig) -> PretrainedConfig:
    """Return a ``config.json`` as Transformers understands it, with the defaults of keys that are left out.

    For a tri-mode or SDAR model, return the configuration of its AR family.

    Raises:
        UserError: A setting has the wrong type, or Transformers does not know the model without code that comes with
            it, which never runs here.
    """
    settings = ar_settings(settings) if architecture(settings) in (TRI_MODE, SDAR) else settings
    kind = str(settings.get("model_type"))
    if kind not in CONFIG_MAPPING:
        if (name := architecture(settings)) in TESTED:
            known = f"'{kind}', which Transformers does not know" if "model_type" in settings else "missing"
            raise UserError(f"config.json of {name}: its model_type is {known}; fetch it again")
        raise unsupported(name)
    try:
        return CONFIG_MAPPING[kind].from_dict(copy.deepcopy(settings))  # it writes into their dictionaries
    except Exception as error:  # a dtype, for example, is looked up in torch
        raise _unusable(architecture(settings), error) from None


def build_reference(config: PretrainedConfig, **options: Any) -> PreTrainedModel:
    """Return Transformers' model of a configuration, with random weights.

    Raises:
        UserError: Transformers cannot build it.
    """
    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, **options)
    except Exception as error:
        raise _unusable((config.architectures or ["the model"])[0], error) from None
    return model


def empty_reference(config: PretrainedConfig, **options: Any) -> PreTrainedModel:
    """Return Transformers' model of a configuration without weights, which takes no memory.

    Rotary frequencies, which no file holds, are computed.

    Raises:
        UserError: Transformers cannot build it.
    """
    with init_empty_weights(), no_init_weights():  # drawing weights on no device would load torch's compiler
        return build_reference(config, **options)


def local_copy(source: str) -> str:
    """Return the directory of a checkpoint: the source itself, or a copy of what the hub holds under that name.

    Raises:
        UserError: It is not a directory, and nothing of that name can be fetched.
    """
    if Path(source).is_dir():
        return source
    try:
        return str(snapshot_download(source, allow_patterns=["*.json", "*.safetensors", "README.md", *PATTERNS]))
    except HFValidationError:  # a path, which cannot be a name
        raise UserError(f"no checkpoint at '{source}'; {REMEDY}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"no checkpoint at '{source}' ({str(error).strip().splitlines()[0]}); {REMEDY}") from None


def _megatron_model(checkpoint: Checkpoint) -> TriModeModelProvider:
    """Return the model that a run configuration describes; Bridge checks every class that is named there."""
    settings = {**checkpoint.run_config["model"], "pipeline_model_parallel_layout": None}  # of its own ranks
    model = apply_run_config_backward_compat(settings)
    file = checkpoint.iteration / "run_config.yaml"
    try:
        with quiet():
            provider = instantiate(model)
    except (InstantiationException, AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"'{file}' cannot be used: {str(error).splitlines()[0]}; take another iteration") from None
    if not isinstance(provider, TriModeModelProvider):
        raise UserError(
            f"'{checkpoint.iteration}' was not made by this project; import the Hugging Face model instead"
        )
    check_config(provider.hf_config, file)
    check_generation_config(provider.hf_generation_config, file)
    reset_parallelism(provider)
    try:
        for setting in fields(provider):
            check_type(provider, setting.name, as_written=False)
    except UserError as error:
        raise UserError(f"'{file}': model.{error}; take another iteration") from None
    return provider
