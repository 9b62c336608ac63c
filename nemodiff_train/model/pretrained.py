"""Where a model comes from: a Hugging Face directory or name, a Megatron checkpoint, or nothing yet."""

from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from megatron.bridge import AutoBridge
from transformers import AutoConfig, GenerationConfig, PretrainedConfig

import nemodiff_train.model.ministral3  # noqa: F401  (registers the family with AutoBridge)
from nemodiff_train.conversion.automodel.directory import MODEL_TYPE, restore
from nemodiff_train.errors import UserError
from nemodiff_train.model.provider import TriModeModelProvider, forget_layout, tri_mode


def model_from(source: str) -> TriModeModelProvider:
    """The model of a checkpoint, without its weights; a run loads them when it builds the model.

    Args:
        source: A Hugging Face directory or name, or a Megatron checkpoint of this project.

    Raises:
        UserError: There is no checkpoint, or its architecture is not supported.
    """
    if is_megatron_checkpoint(Path(source)):
        return _megatron_model(Path(source))
    provider = model_like(hf_config(source))
    provider.hf_generation_config = _generation_config(source)
    settings, _ = PretrainedConfig.get_config_dict(source)
    if settings.get("model_type") == MODEL_TYPE:
        restore(provider, settings)
    return provider


def model_like(config: PretrainedConfig) -> TriModeModelProvider:
    """The model that a Hugging Face configuration describes.

    Raises:
        UserError: The architecture is not supported.
    """
    provider = auto_bridge(config).to_megatron_provider(load_weights=False)
    return tri_mode(provider, config.to_dict())


def auto_bridge(config: PretrainedConfig) -> Any:
    """Bridge's converter for a Hugging Face configuration.

    Raises:
        UserError: Bridge does not know the architecture; names it and those that are known to work.
    """
    architecture = (config.architectures or ["no architecture"])[0]
    if not AutoBridge.supports(config):
        raise UserError(f"{architecture} is not supported; supported: {', '.join(supported_architectures())}")
    try:
        return AutoBridge.from_hf_config(config)
    except (ValueError, NotImplementedError) as error:
        raise UserError(f"{architecture} cannot be converted: {str(error).splitlines()[0]}") from None


def supported_architectures() -> tuple[str, ...]:
    """Architectures whose conversion and training are tested here."""
    return ("Qwen3ForCausalLM", "Ministral3ForCausalLM")


def hf_config(source: str) -> PretrainedConfig:
    """The Hugging Face configuration in a directory or of a name; the AR family's, of a tri-mode one.

    Raises:
        UserError: There is none.
    """
    path = Path(source)
    if path.exists() and not (path / "config.json").is_file():
        raise UserError(f"'{source}' is no checkpoint: it has neither config.json nor iter_* folders")
    try:
        settings, _ = PretrainedConfig.get_config_dict(source)
        if settings.get("model_type") == MODEL_TYPE:  # its code need not be run to know the family
            return AutoConfig.for_model(**settings["text_config"])
        return AutoConfig.from_pretrained(source)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"no Hugging Face model at '{source}' ({reason})") from None


def local_copy(source: str) -> str:
    """The directory of a checkpoint: itself, or what the hub holds under that name.

    Raises:
        UserError: It is no directory, and nothing of that name can be fetched.
    """
    if Path(source).is_dir():
        return source
    try:
        return str(snapshot_download(source, allow_patterns=["*.json", "*.safetensors", "*.jinja", "tokenizer*"]))
    except (OSError, ValueError) as error:
        raise UserError(f"no checkpoint at '{source}' ({str(error).strip().splitlines()[0]})") from None


def _generation_config(source: str) -> dict[str, Any]:
    try:
        config: dict[str, Any] = GenerationConfig.from_pretrained(source).to_diff_dict()
    except OSError:  # many models have none
        return {}
    return config


def is_megatron_checkpoint(path: Path) -> bool:
    """Whether ``path`` is a Megatron checkpoint or a folder of them."""
    return (path / "run_config.yaml").is_file() or any(path.glob("iter_*/run_config.yaml"))


def newest_iteration(path: Path) -> Path:
    """The newest ``iter_*`` folder of a Megatron checkpoint folder (or ``path``, if it is one itself).

    Raises:
        UserError: It is no Megatron checkpoint.
    """
    if (path / "run_config.yaml").is_file():
        return path
    found = sorted(path.glob("iter_*/run_config.yaml"))
    if not found:
        raise UserError(f"'{path}' is no Megatron checkpoint: it has no iter_*/run_config.yaml")
    return found[-1].parent


def _megatron_model(path: Path) -> TriModeModelProvider:
    from megatron.bridge.training.model_load_save import load_model_config

    iteration = newest_iteration(path)
    provider, _ = load_model_config(str(iteration))
    if not isinstance(provider, TriModeModelProvider):
        raise UserError(f"'{iteration}' was not made by this project; import the Hugging Face model instead")
    forget_layout(provider)
    return provider
