"""The paper's two stages on a published model, as variants of the base configuration, for 8 to 256 GPUs of 80 GB.

Tokens, learning rates, batch, length and weight decay are the paper's (Nemotron-Labs-Diffusion, arXiv 2607.05722,
section 5), which does not give the shares of warm-up and decay; 1% and 20% are those of Megatron Bridge's recipe.
"""

from collections.abc import Callable
from dataclasses import dataclass

from nemodiff_train.config.config import TriModeConfig
from nemodiff_train.config.datasets import TextDatasetConfig
from nemodiff_train.config.defaults import (
    adamw,
    base_config,
    enable_async_save,
    overlap_communication,
    schedule,
    set_tensor_parallel,
)
from nemodiff_train.errors import UserError
from nemodiff_train.model.pretrained import model_from
from nemodiff_train.objective import ObjectiveConfig
from nemodiff_train.objective.presets import preset

Recipe = Callable[..., TriModeConfig]

AR_TOKENS, JOINT_TOKENS = 10**12, 3 * 10**11
"""Clean tokens of each stage."""
BATCH_SIZE, LENGTH = 512, 4096
"""Samples per step and clean tokens per sample."""


@dataclass(frozen=True)
class Size:
    """One published size: the shape that identifies its checkpoint, and its layout."""

    layers: int
    hidden: int
    tensor_parallel: int
    """Tensor-parallel size; divides the key-value heads, the batch, and 8 to 256 GPUs."""


def two_stages(size: Size) -> tuple[Recipe, Recipe]:
    """Return the recipes of both stages: AR training on one trillion tokens, then joint training on 300 billion.

    Both take ``start_from``, a Hugging Face directory or name or a Megatron checkpoint; ``data``, the prefix of a
    data set made by 'nemodiff data prepare'; ``output``, the folder of the run; and ``precision``, a name of Megatron
    Bridge's, such as ``bf16_with_fp8_current_scaling_mixed``.  The joint stage takes ``mask_token``, a token that
    never occurs in the data; by default it is the checkpoint's mask token, else the tokenizer's.
    """

    def ar(start_from: str, data: str, output: str, precision: str = "bf16_mixed") -> TriModeConfig:
        """Train the AR model on, on one trillion tokens."""
        return _stage(size, ObjectiveConfig(stage="ar"), AR_TOKENS, start_from, data, output, precision)

    def joint(
        start_from: str, data: str, output: str, mask_token: str | None = None, precision: str = "bf16_mixed"
    ) -> TriModeConfig:
        """Train the AR model of the first stage jointly with block diffusion, on 300 billion tokens."""
        objective = preset("nemotron", mask_token=mask_token)
        return _stage(size, objective, JOINT_TOKENS, start_from, data, output, precision)

    return ar, joint


def _stage(
    size: Size, objective: ObjectiveConfig, tokens: int, start_from: str, data: str, output: str, precision: str
) -> TriModeConfig:
    """Return one stage.

    Raises:
        UserError: ``start_from`` is of another size.
    """
    model = model_from(start_from)
    if (model.num_layers, model.hidden_size) != (size.layers, size.hidden):
        raise UserError(
            f"'{start_from}' has {model.num_layers} layers of width {model.hidden_size}, but this recipe is for "
            f"{size.layers} of width {size.hidden}; take the recipe of its size, or 'joint' for another model"
        )
    steps = -(-tokens // (BATCH_SIZE * LENGTH))
    config = base_config(
        set_tensor_parallel(model, size.tensor_parallel),
        objective,
        TextDatasetConfig(seq_length=LENGTH, data=[data], split="100,0,0"),
        start_from=start_from,
        output=output,
        steps=steps,
        batch_size=BATCH_SIZE,
        optimizer=adamw(1e-5, 3e-6, sharded=True),
        scheduler=schedule(warmup=0.01, decay=0.2),
        precision=precision,
    )
    overlap_communication(config)
    enable_async_save(config.checkpoint)
    config.checkpoint.most_recent_k = 3  # a stage saves hundreds, each with the optimizer state
    return config
