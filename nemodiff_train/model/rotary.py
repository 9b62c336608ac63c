"""Rotary angles that follow a ``config.json``: frequencies by Transformers' own functions, whatever the scaling."""

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

SCALINGS = ("default", "linear", "llama3", "yarn")
"""Values of ``rope_type`` whose frequencies do not depend on the length of the text."""


def scaled_frequencies(rope: dict[str, Any], head_dim: int) -> tuple[Tensor, float]:
    """Return the frequencies [head_dim / 2] fp32 of a scaled rotary embedding, and the factor of sine and cosine.

    Args:
        rope: ``rope_parameters`` of a ``config.json``, complete with defaults; its ``rope_type`` is in ``SCALINGS``.
        head_dim: Dimensions of a head, all of which are rotated.
    """
    config: Any = PreTrainedConfig()
    config.max_position_embeddings = rope.get("original_max_position_embeddings")
    config.rope_parameters, config.head_dim = rope, head_dim
    config.hidden_size, config.num_attention_heads = head_dim, 1  # looked up, and not used beside head_dim
    frequencies, factor = ROPE_INIT_FUNCTIONS[rope["rope_type"]](config, torch.device("cpu"))
    return frequencies, float(factor)
