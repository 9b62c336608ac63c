"""What a ``config.json`` describes: which AR family, under which names, with which diffusion settings.

Plain dictionaries and strings only, so that a directory can be looked at without importing anything large.
"""

from typing import Any

NEMOTRON = "NemotronLabsDiffusionModel"
VISION_LANGUAGE = "Mistral3ForConditionalGeneration"
TRI_MODE = "TriModeModel"
"""Ours: an AR family's weights under their own names, with code that decodes in every mode."""

VOCABULARY_TENSORS = ("model.embed_tokens.weight", "lm_head.weight")
"""Tensors of an AR model with a row for each token."""

# How the tensors of ``Ministral3ForCausalLM`` are called in directories of other architectures.
_PREFIXES = {
    NEMOTRON: {"model.": "encoder.", "lm_head.": "diffusion_head."},
    VISION_LANGUAGE: {"model.": "language_model.model.", "lm_head.": "language_model.lm_head."},
}

# What such a directory holds besides the language model.
_LEFT_OUT = {VISION_LANGUAGE: ("vision_tower.", "multi_modal_projector.")}

# Settings of a NemotronLabsDiffusion model that an AR model does not have.
_DIFFUSION_KEYS = {
    "auto_map",
    "mask_token_id",
    "block_size",
    "dlm_paradigm",
    "dlm_type",
    "dlm_loss_weight",
    "ar_loss_weight",
    "dp_varying_mask_ratio",
    "attn_implementation",
}


def architecture(settings: dict[str, Any]) -> str:
    """The architecture that a ``config.json`` names first, or ``"no architecture"``."""
    return str((settings.get("architectures") or ["no architecture"])[0])


def ar_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """The ``config.json`` of the AR model alone.

    That is the text model of a vision-language one, the family of a tri-mode one, and the Ministral 3 that a
    NemotronLabsDiffusion model is when it is decoded autoregressively.  Any other configuration is returned as it is.
    """
    kind = architecture(settings)
    if kind == VISION_LANGUAGE:
        text = dict(settings.get("text_config") or {})
        stored = {key: settings[key] for key in ("dtype", "torch_dtype") if key in settings}
        return {"architectures": ["Ministral3ForCausalLM"], **stored, **text, "model_type": "ministral3"}
    if kind == TRI_MODE:
        return dict(settings.get("text_config") or {})
    if kind == NEMOTRON:
        kept = {key: value for key, value in settings.items() if key not in _DIFFUSION_KEYS}
        return {**kept, "architectures": ["Ministral3ForCausalLM"], "model_type": "ministral3"}
    return settings


def stored_name(kind: str, name: str) -> str:
    """How a tensor of the AR model is called in a directory of architecture ``kind``."""
    for ours, theirs in _PREFIXES.get(kind, {}).items():
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    return name


def is_left_out(kind: str, name: str) -> bool:
    """Whether a stored tensor is knowingly not part of the language model.

    Besides vision towers these are the rotary frequencies that old Llama checkpoints carry.
    """
    return name.startswith(_LEFT_OUT.get(kind, ())) or name.endswith("rotary_emb.inv_freq")
