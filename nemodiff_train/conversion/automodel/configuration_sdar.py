"""Configuration of an SDAR model: a Qwen 3's, with the attribute from which servers take the rotary base.

This file is copied into exported directories and runs there: it needs Transformers only.
"""

from typing import Any

from transformers import Qwen3Config


class SDARConfig(Qwen3Config):
    """Configuration of ``SDARForCausalLM``, for SGLang and lmdeploy.

    Transformers 5 keeps ``rope_theta`` inside ``rope_parameters``; a server that asks for the attribute would go on
    with a default of its own.
    """

    model_type = "sdar"

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        rope = getattr(self, "rope_parameters", None) or {}
        self.rope_theta = rope.get("rope_theta", getattr(self, "rope_theta", None))
