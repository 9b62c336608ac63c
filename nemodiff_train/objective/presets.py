"""Published objectives, as settings of :class:`~nemodiff_train.objective.config.ObjectiveConfig`.

Each sets what its paper says about samples, attention and loss; learning rates, data and lengths belong to a recipe.
``docs/objectives.md`` states each formula, and what differs from the paper's own code.
"""

import copy
from dataclasses import replace
from typing import Any

from nemodiff_train.errors import UserError, nearest
from nemodiff_train.objective.config import ObjectiveConfig

PRESETS = {
    # Nemotron-Labs-Diffusion, arXiv 2607.05722, section 2.1; block size of the released models
    "nemotron": ObjectiveConfig(),
    # Efficient-DLM, arXiv 2512.14067: block 64 for 4B and more, 16 for 1.5B
    "efficient_dlm": ObjectiveConfig(
        alpha=1.0,
        ar_weight=0.0,
        block_size=64,
        clean_attention="block_causal",
        noise_granularity="block",
        mask_sampling="exact",
        position_bias_half_life=0.1,
    ),
    # TiDAR, arXiv 2511.08923, section 3: (mean AR + mean diffusion) / 2 with every position masked
    "tidar": ObjectiveConfig(alpha=0.5, ar_weight=0.5, block_size=16, weighting="none", fully_masked_fraction=1.0),
    # Set Block Decoding, arXiv 2509.04185: no weights at all, block size 2 to 16 drawn per step
    "set_block": ObjectiveConfig(
        alpha=1.0, weighting="none", block_size=16, block_schedule="random", block_sizes=[2, 16]
    ),
    # Fast-dLLM v2, arXiv 2509.26328: each position is masked in one of two views, hence the 2 in alpha
    "fast_dllm_v2": ObjectiveConfig(
        alpha=2.0,
        weighting="none",
        clean_attention="block_causal",
        shift=True,
        views=2,
        complementary=True,
        noise_granularity="block",
    ),
    # BD3-LM, arXiv 2503.09573: block 4 with the clipped window found best for it on LM1B
    "bd3": ObjectiveConfig(
        alpha=1.0,
        ar_weight=0.0,
        block_size=4,
        clean_attention="block_causal",
        noise_granularity="block",
        min_noise_level=0.45,
        max_noise_level=0.95,
        noise_level_sampling="stratified",
    ),
}


def preset(name: str, **changes: Any) -> ObjectiveConfig:
    """Return the objective of a published method.

    Args:
        name: One of :data:`PRESETS`.
        changes: Fields that differ.

    Raises:
        UserError: There is no such preset.
    """
    if name not in PRESETS:
        raise UserError(f"no objective '{name}'; known: {', '.join(PRESETS)}.{nearest(name, PRESETS)}")
    return replace(copy.deepcopy(PRESETS[name]), **changes)
