"""The paper's two stages on Ministral 3 and Qwen 3, for 8 to 256 GPUs: AR training, then joint training.

The GPUs have 80 GB.  Tokens, learning rates, batch, length and weight decay are the paper's (Nemotron-Labs-Diffusion,
arXiv 2607.05722, section 5), which does not give the shares of warm-up and decay; 1% and 20% are those of Megatron
Bridge's recipe.
"""

from dataclasses import dataclass
from typing import Any

from transformers import Ministral3Config, PretrainedConfig, Qwen3Config

from nemodiff_train.config.config import TriModeConfig
from nemodiff_train.config.datasets import TextDatasetConfig
from nemodiff_train.config.defaults import (
    adamw,
    base_config,
    check_size,
    overlap_communication,
    schedule,
    set_tensor_parallel,
)
from nemodiff_train.config.recipes import Recipe
from nemodiff_train.model.pretrained import model_from
from nemodiff_train.objective import ObjectiveConfig
from nemodiff_train.objective.presets import preset

AR_TOKENS, JOINT_TOKENS = 10**12, 3 * 10**11
"""Clean tokens of each stage."""
BATCH_SIZE, LENGTH = 512, 4096
"""Samples per step and clean tokens per sample."""


@dataclass(frozen=True)
class ModelSize:
    """The shape of one published model, and its layout; all have 8 key-value heads of 128 channels."""

    layers: int
    hidden: int
    heads: int
    feed_forward: int
    tensor_parallel: int
    """Tensor-parallel size; divides the key-value heads, the batch, and 8 to 256 GPUs."""
    tied: bool = False
    """Whether embedding and output layer share one matrix."""

    def config(self, family: str) -> PretrainedConfig:
        """Return the configuration of a model of this size.

        Args:
            family: ``ministral3`` or ``qwen3``.
        """
        settings: dict[str, Any] = {
            "num_hidden_layers": self.layers,
            "hidden_size": self.hidden,
            "intermediate_size": self.feed_forward,
            "num_attention_heads": self.heads,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "tie_word_embeddings": self.tied,
        }
        if family == "ministral3":
            names = ["Ministral3ForCausalLM"]
            return Ministral3Config(architectures=names, vocab_size=131072, **settings)
        return Qwen3Config(architectures=["Qwen3ForCausalLM"], vocab_size=151936, **settings)


SIZES = {
    "ministral3": {
        "3b": ModelSize(26, 3072, 32, 9216, tensor_parallel=1, tied=True),
        "8b": ModelSize(34, 4096, 32, 14336, tensor_parallel=4),
        "14b": ModelSize(40, 5120, 32, 16384, tensor_parallel=8),
    },
    "qwen3": {
        "4b": ModelSize(36, 2560, 32, 9728, tensor_parallel=1, tied=True),
        "8b": ModelSize(36, 4096, 32, 12288, tensor_parallel=4),
        "14b": ModelSize(40, 5120, 40, 17408, tensor_parallel=8),
    },
}
"""Shapes by family and size, as in the names of recipes: ``FAMILY_SIZE_STAGE``."""


def _two_stages(size: ModelSize) -> tuple[Recipe, Recipe]:
    """Return the recipes of both stages: AR training on one trillion tokens, then joint training on 300 billion.

    Their arguments: ``start_from``, ``output`` and ``precision`` as in
    :func:`~nemodiff_train.config.defaults.base_config`; ``data``, the prefix of a data set of 'nemodiff data
    prepare'; and ``mask_token``, a token that never occurs in it, by default the checkpoint's, else the tokenizer's.
    """

    def ar(start_from: str, data: str, output: str, precision: str = "bf16_mixed") -> TriModeConfig:
        """Continue the AR training of a model on one trillion tokens."""
        return _stage(size, ObjectiveConfig(stage="ar"), AR_TOKENS, start_from, data, output, precision)

    def joint(
        start_from: str, data: str, output: str, mask_token: str | None = None, precision: str = "bf16_mixed"
    ) -> TriModeConfig:
        """Train the AR model of the first stage jointly with block diffusion, on 300 billion tokens."""
        objective = preset("nemotron", mask_token=mask_token)
        return _stage(size, objective, JOINT_TOKENS, start_from, data, output, precision)

    return ar, joint


def _stage(
    size: ModelSize, objective: ObjectiveConfig, tokens: int, start_from: str, data: str, output: str, precision: str
) -> TriModeConfig:
    """Return one stage."""
    model = model_from(start_from)
    check_size(model, start_from, size.layers, size.hidden)
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
    # A process of each rank writes while training goes on; a stage saves hundreds, each with the optimizer state.
    config.checkpoint.async_save, config.checkpoint.async_strategy = True, "mcore"
    config.checkpoint.most_recent_k = 3
    return config


ministral3_3b_ar, ministral3_3b_joint = _two_stages(SIZES["ministral3"]["3b"])
ministral3_8b_ar, ministral3_8b_joint = _two_stages(SIZES["ministral3"]["8b"])
ministral3_14b_ar, ministral3_14b_joint = _two_stages(SIZES["ministral3"]["14b"])
qwen3_4b_ar, qwen3_4b_joint = _two_stages(SIZES["qwen3"]["4b"])
qwen3_8b_ar, qwen3_8b_joint = _two_stages(SIZES["qwen3"]["8b"])
qwen3_14b_ar, qwen3_14b_joint = _two_stages(SIZES["qwen3"]["14b"])
