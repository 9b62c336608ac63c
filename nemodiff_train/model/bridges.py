"""Bridge's converters between Hugging Face and Megatron; that of an architecture is imported when it is asked for."""

import importlib
from typing import Any

from megatron.bridge import AutoBridge
from transformers import PretrainedConfig

from nemodiff_train.errors import UserError
from nemodiff_train.model.families import TESTED, unsupported
from nemodiff_train.runtime.deferred import execute

_MODULES = {
    "Qwen3ForCausalLM": "megatron.bridge.models.qwen.qwen3_bridge",
    "Qwen2ForCausalLM": "megatron.bridge.models.qwen.qwen2_bridge",
    "LlamaForCausalLM": "megatron.bridge.models.llama.llama_bridge",
}
"""Modules of Bridge that register the converter of one architecture."""


def auto_bridge(config: PretrainedConfig) -> Any:
    """Return Bridge's converter for a Hugging Face configuration.

    Raises:
        UserError: Bridge does not know the architecture; names it and those that are known to work.
    """
    name = (config.architectures or ["no architecture"])[0]
    if "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {}):
        raise UserError(
            f"config.json of {name} names code of its own (auto_map), which never runs here; remove auto_map if the "
            f"model computes what {name} of Transformers does"
        )
    if not AutoBridge.supports(config):
        raise unsupported(name)
    if name in _MODULES:
        importlib.import_module(_MODULES[name])
    elif name in TESTED:
        importlib.import_module("nemodiff_train.model.ministral3").register()
    else:  # all of Bridge's, which takes seconds
        execute("megatron.bridge")
    try:
        return AutoBridge.from_hf_config(config)
    except (ValueError, NotImplementedError):
        raise unsupported(name) from None
