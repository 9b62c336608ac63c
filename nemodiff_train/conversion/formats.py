"""Formats of the Hugging Face directories that a checkpoint can be exported to."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from nemodiff_train.errors import UserError
from nemodiff_train.model.families import (
    NEMOTRON,
    SDAR,
    SDAR_MASK_TOKEN,
    TRI_MODE,
    HFConfig,
    ar_settings,
    architecture,
)
from nemodiff_train.model.pretrained import config_from
from nemodiff_train.model.provider import TriModeModelProvider

REMOTE_CODE = {
    "AutoConfig": "configuration_nemotron_labs_diffusion.NemotronLabsDiffusionConfig",
    "AutoModel": "modeling_nemotron_labs_diffusion.NemotronLabsDiffusionModel",
}
"""Classes that load a NemotronLabsDiffusion directory; their files are NVIDIA's and not part of this project."""

BACKBONES = ("Ministral3ForCausalLM", "LlamaForCausalLM", "MistralForCausalLM")
"""Families that compute what a NemotronLabsDiffusion model does, where their attention and MLP have no biases."""

_SHAPE = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps",
    "attention_dropout", "bos_token_id", "eos_token_id", "pad_token_id",
)  # fmt: skip
"""Settings of every dense family, whose defaults differ from class to class: written whatever they are."""


@dataclass(frozen=True)
class Format:
    """One format: its ``config.json``, and with it the names of its tensors."""

    settings: Callable[[TriModeModelProvider], HFConfig]
    """Returns the ``config.json`` of a model; refuses a model that the format cannot hold."""
    needs_code: bool = False
    """Whether the directory is loaded by Python files of its publisher."""
    includes: tuple[str, ...] = ()
    """Python files of this project, beside :mod:`.automodel.card`, that the directory gets."""


def ar_format(provider: TriModeModelProvider) -> HFConfig:
    """Return the ``config.json`` of the AR family itself, for any server of the family."""
    settings = {key: value for key, value in ar_settings(provider.hf_config).items() if key != "auto_map"}
    return _in_dtype({**_keys_of_engines(settings), **settings}, provider.params_dtype)


def nemotron_format(provider: TriModeModelProvider) -> HFConfig:
    """Return the ``config.json`` of a NemotronLabsDiffusion model, with the keys of the published ones.

    Raises:
        UserError: The model is of another family, has no mask token, or decodes in another way.
    """
    settings = ar_settings(provider.hf_config)
    family = architecture(settings)
    other = [f"{key}=true" for key in ("attention_bias", "mlp_bias") if settings.get(key)]
    if settings.get("hidden_act", "silu") != "silu":
        other.append(f"hidden_act={settings['hidden_act']}")
    if family not in BACKBONES or other:
        raise UserError(
            "--format nemotron holds Ministral 3, Llama and Mistral models without biases, but this is "
            f"{' with '.join([family, *other])}; use --format ar or tri-mode"
        )
    if provider.mask_token_id is None:
        raise UserError(
            "--format nemotron needs a mask token, but this checkpoint has none; train it jointly, or import it with "
            "--mask-token"
        )
    if provider.shift or provider.clean_attention != "causal":
        raise UserError(
            "--format nemotron is decoded without shift and with causal attention on clean text, but this model has "
            f"{_objective(provider)}; use --format ar"
        )
    diffusion = {
        "mask_token_id": provider.mask_token_id,
        "block_size": provider.block_size,
        "tie_word_embeddings": False,  # the head is always written
    }
    config = config_from(settings)
    # The query scale of a Ministral 3, which is 1 for other families.
    scale = {"llama_4_scaling_beta": 0.0, "original_max_position_embeddings": config.max_position_embeddings}
    unscaled = {} if "llama_4_scaling_beta" in config.rope_parameters else scale
    named = {"auto_map": REMOTE_CODE, "rope_parameters": {**unscaled, **config.rope_parameters}}
    if architecture(provider.hf_config) == NEMOTRON:
        return _in_dtype({**named, **provider.hf_config, **diffusion}, provider.params_dtype)
    known = config.to_dict()
    # A Ministral 3 does not read other keys of a family.
    kept = settings if family == "Ministral3ForCausalLM" else {}
    return _in_dtype(
        {
            **kept,
            **{key: known.get(key) for key in _SHAPE},
            "head_dim": known.get("head_dim") or known["hidden_size"] // known["num_attention_heads"],
            **named,
            "architectures": [NEMOTRON],
            "model_type": "nemotron_labs_diffusion",
            "attention_bias": False,
            "mlp_bias": False,
            "sliding_window": None,
            "dlm_paradigm": "bidirectional",  # how the published models are decoded
            "ar_loss_weight": 1.0,
            "dlm_loss_weight": None,
            "dp_varying_mask_ratio": False,
            **diffusion,
        },
        provider.params_dtype,
    )


def sdar_format(provider: TriModeModelProvider) -> HFConfig:
    """Return the ``config.json`` of an SDAR model: a Qwen 3 that attends block-causally and predicts without shift.

    Raises:
        UserError: It is another model, or has another mask token.
    """
    settings = ar_settings(provider.hf_config)
    if architecture(settings) != "Qwen3ForCausalLM" or provider.shift or provider.clean_attention != "block_causal":
        raise UserError(
            "--format sdar holds a Qwen3ForCausalLM with shift=false and clean_attention=block_causal, but this is "
            f"{architecture(settings)} with {_objective(provider)}; use --format tri-mode"
        )
    if provider.mask_token_id != SDAR_MASK_TOKEN:
        raise UserError(
            f"--format sdar is decoded with the mask token {SDAR_MASK_TOKEN}, but this model has "
            f"{provider.mask_token_id}; import Qwen 3 with --add-mask-token, which gives it this id"
        )
    return {
        **ar_format(provider),
        "architectures": [SDAR],
        "auto_map": {"AutoConfig": "configuration_sdar.SDARConfig"},
        "model_type": "sdar",
        "mask_token_id": provider.mask_token_id,
        "block_size": provider.block_size,
    }


def _objective(provider: TriModeModelProvider) -> str:
    return f"shift={str(provider.shift).lower()} and clean_attention={provider.clean_attention}"


def _keys_of_engines(settings: HFConfig) -> HFConfig:
    """Return settings of an AR model under the names that servers know, beside those of Transformers 5.

    ``rope_theta`` and ``rope_scaling`` are read by Transformers 4.57 and mlx-lm, which take their own defaults where
    they are missing; ``llama_4_scaling`` by vLLM; ``original_max_position_embeddings`` by SGLang.
    """
    config = config_from(settings)
    keys: HFConfig = {"tie_word_embeddings": bool(config.tie_word_embeddings)}
    rope = getattr(config, "rope_parameters", None) or {}
    if "rope_theta" not in rope:  # no rotary embedding, or several
        return keys
    keys |= {"rope_parameters": rope, "rope_theta": rope["rope_theta"]}
    if rope.get("rope_type", "default") != "default":
        keys["rope_scaling"] = {name: value for name, value in rope.items() if name != "rope_theta"}
    if "partial_rotary_factor" in rope:
        keys["partial_rotary_factor"] = rope["partial_rotary_factor"]
    if beta := rope.get("llama_4_scaling_beta"):
        keys["original_max_position_embeddings"] = length = rope["original_max_position_embeddings"]
        keys["llama_4_scaling"] = {"original_max_position_embeddings": length, "beta": beta}
    return keys


def tri_mode_format(provider: TriModeModelProvider) -> HFConfig:
    """Return the ``config.json`` of a directory whose own code decodes in every mode.

    Names and shapes of the weights are those of the AR family.

    Raises:
        UserError: The model has no mask token.
    """
    if provider.mask_token_id is None:
        raise UserError(
            "--format tri-mode needs a mask token, and this checkpoint has had no joint stage; use --format ar"
        )
    family, model = ar_format(provider), f"modeling_tri_mode.{TRI_MODE}"
    return {
        "architectures": [TRI_MODE],
        "auto_map": {
            "AutoConfig": "configuration_tri_mode.TriModeConfig",
            "AutoModel": model,
            "AutoModelForCausalLM": model,
        },
        "model_type": "tri_mode",
        "dtype": family.get("dtype"),
        "mask_token_id": provider.mask_token_id,
        "block_size": provider.block_size,
        "shift": provider.shift,
        "clean_attention": provider.clean_attention,
        "text_config": family,
    }


FORMATS = {
    "ar": Format(ar_format),
    "nemotron": Format(nemotron_format, needs_code=True),
    # Without the class that its config.json names, rope_theta would be lost; see the file.
    "sdar": Format(sdar_format, includes=("configuration_sdar.py",)),
    "tri-mode": Format(tri_mode_format, includes=("configuration_tri_mode.py", "modeling_tri_mode.py")),
}
"""Formats by their names in ``--format``."""


def default_format(provider: TriModeModelProvider) -> str:
    """Return the name of the format that a model came in."""
    return "nemotron" if architecture(provider.hf_config) == NEMOTRON else "ar"


def code_files(settings: HFConfig, directory: str) -> list[Path]:
    """Return the Python files of a directory, which must have those that the ``auto_map`` of a model names.

    Raises:
        UserError: One of them is missing.
    """
    for target in settings["auto_map"].values():
        file = Path(directory) / f"{target.split('--')[-1].split('.')[0]}.py"  # "repository--file.Class" on the hub
        if not file.is_file():
            raise UserError(f"--remote-code '{directory}' lacks {file.name}, which config.json names")
    return sorted(Path(directory).glob("*.py"))


def _in_dtype(settings: HFConfig, dtype: torch.dtype) -> HFConfig:
    """Return settings that name the dtype of the weights, under the key that is there."""
    key = "torch_dtype" if "torch_dtype" in settings else "dtype"
    return {**settings, key: str(dtype).removeprefix("torch.")}
