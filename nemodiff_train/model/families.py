"""AR family, tensor names and diffusion settings of the model that a ``config.json`` describes.

Only dictionaries and strings, so that a directory can be inspected without importing anything large.
"""

from typing import Any

from nemodiff_train.errors import UserError

HFConfig = dict[str, Any]
"""The contents of a Hugging Face ``config.json`` or ``generation_config.json``."""

NEMOTRON = "NemotronLabsDiffusionModel"
VISION_LANGUAGE = "Mistral3ForConditionalGeneration"
TRI_MODE = "TriModeModel"
"""Architecture of this package's exports: an AR family's weights and names, with code that decodes in every mode."""

SDAR = "SDARForCausalLM"
"""A Qwen 3 that predicts without shift and attends block-causally."""

SDAR_MASK_TOKEN = 151669
"""Mask token of every SDAR model; servers have it in their code."""

_DIFFUSION_DEFAULTS: dict[str, HFConfig] = {
    NEMOTRON: {"mask_token_id": None, "block_size": 32, "shift": False, "clean_attention": "causal"},
    SDAR: {
        "mask_token_id": SDAR_MASK_TOKEN, "block_size": 4, "shift": False, "clean_attention": "block_causal",
    },
    TRI_MODE: {},
}  # fmt: skip
"""How a model of block diffusion is decoded where its ``config.json`` does not say."""

TESTED = (
    "Qwen3ForCausalLM", "Qwen2ForCausalLM", "LlamaForCausalLM", "MistralForCausalLM", "Ministral3ForCausalLM",
    NEMOTRON, VISION_LANGUAGE,
)  # fmt: skip
"""Architectures whose computation is known to be Transformers'; others are compared with it at import."""

VOCABULARY_TENSORS = ("model.embed_tokens.weight", "lm_head.weight")
"""Tensors of an AR model with one row per token."""

# Prefixes of the tensors of ``Ministral3ForCausalLM``, and what they are in directories of other architectures.
_PREFIXES = {
    NEMOTRON: {"model.": "encoder.", "lm_head.": "diffusion_head."},
    VISION_LANGUAGE: {"model.": "language_model.model.", "lm_head.": "language_model.lm_head."},
}

# Prefixes of what such a directory holds besides the language model.
_IGNORED = {VISION_LANGUAGE: ("vision_tower.", "multi_modal_projector.")}

# Architecture and ``model_type`` of the AR model that a model of block diffusion is made from.
_MADE_FROM = {NEMOTRON: ("Ministral3ForCausalLM", "ministral3"), SDAR: ("Qwen3ForCausalLM", "qwen3")}

# Settings of a NemotronLabsDiffusion or SDAR model that an AR model does not have.
_DIFFUSION_KEYS = {
    "auto_map", "mask_token_id", "block_size", "dlm_paradigm", "dlm_type", "dlm_loss_weight", "ar_loss_weight",
    "dp_varying_mask_ratio", "attn_implementation",
}  # fmt: skip


def unsupported(name: str) -> UserError:
    """Return the error for an architecture that Bridge does not know; it names those that are tested here."""
    return UserError(f"{name} is not supported; supported: {', '.join([*TESTED, SDAR, TRI_MODE])}")


def architecture(settings: HFConfig) -> str:
    """Return the architecture that a ``config.json`` names first, or ``"no architecture"``."""
    return str((settings.get("architectures") or ["no architecture"])[0])


def ar_settings(settings: HFConfig) -> HFConfig:
    """Return the ``config.json`` of the AR model alone.

    That is the text model of a vision-language model, the AR family of a tri-mode model, and the Ministral 3 or the
    Qwen 3 that a NemotronLabsDiffusion or SDAR model is made from. Any other configuration is returned unchanged.
    """
    kind = architecture(settings)
    if kind == VISION_LANGUAGE:
        text = dict(settings.get("text_config") or {})
        stored = {key: settings[key] for key in ("dtype", "torch_dtype") if key in settings}
        return {"architectures": ["Ministral3ForCausalLM"], **stored, **text, "model_type": "ministral3"}
    if kind == TRI_MODE:
        return dict(settings.get("text_config") or {})
    if kind in _MADE_FROM:
        kept = {key: value for key, value in settings.items() if key not in _DIFFUSION_KEYS}
        family, model_type = _MADE_FROM[kind]
        return {**kept, "architectures": [family], "model_type": model_type}
    return settings


def diffusion_settings(settings: HFConfig) -> HFConfig:
    """Return mask token, block size, shift and clean attention of a model of block diffusion; nothing of another."""
    defaults = _DIFFUSION_DEFAULTS.get(architecture(settings))
    if defaults is None:
        return {}
    known = {**defaults, **settings}
    if architecture(settings) == NEMOTRON:  # its code knows neither
        known |= {name: defaults[name] for name in ("shift", "clean_attention")}
    if (known["mask_token_id"] or 0) < 0:  # a released AR model has -1
        known["mask_token_id"] = None
    return {key: known[key] for key in ("mask_token_id", "block_size", "shift", "clean_attention")}


def stored_name(kind: str, name: str) -> str:
    """Return the name of an AR model's tensor in a directory of architecture ``kind``."""
    for ar_prefix, prefix in _PREFIXES.get(kind, {}).items():
        if name.startswith(ar_prefix):
            return prefix + name.removeprefix(ar_prefix)
    return name


def is_left_out(kind: str, name: str) -> bool:
    """Return whether a stored tensor is known not to be part of the language model.

    Besides vision towers, these are the rotary frequencies in old Llama checkpoints.
    """
    return name.startswith(_IGNORED.get(kind, ())) or name.endswith("rotary_emb.inv_freq")
