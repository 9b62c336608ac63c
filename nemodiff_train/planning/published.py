"""The published sizes that recipes are named after: enough of their configuration to plan without a checkpoint."""

from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from transformers import Ministral3Config, PretrainedConfig, Qwen3Config

from nemodiff_train.config.config import TriModeConfig
from nemodiff_train.config.recipes import load_recipe

_YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e6,
    "factor": 16.0,
    "original_max_position_embeddings": 16384,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.1,
}


@dataclass(frozen=True)
class PublishedSize:
    """The shape of one published model; all have 8 key-value heads of 128 channels."""

    layers: int
    hidden: int
    heads: int
    feed_forward: int
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
            return Ministral3Config(architectures=names, vocab_size=131072, rope_parameters=_YARN, **settings)
        return Qwen3Config(architectures=["Qwen3ForCausalLM"], vocab_size=151936, **settings)


SIZES = {
    "ministral3": {
        "3b": PublishedSize(26, 3072, 32, 9216, tied=True),
        "8b": PublishedSize(34, 4096, 32, 14336),
        "14b": PublishedSize(40, 5120, 32, 16384),
    },
    "qwen3": {
        "4b": PublishedSize(36, 2560, 32, 9728, tied=True),
        "8b": PublishedSize(36, 4096, 32, 12288),
        "14b": PublishedSize(40, 5120, 40, 17408),
    },
}
"""By family and size, as in the names of recipes: ``FAMILY_SIZE_STAGE``."""


def write_config(recipe: str, folder: Path) -> bool:
    """Write the ``config.json`` of the model that a recipe is named after; return whether it is named after one."""
    family, _, rest = recipe.partition("_")
    size = SIZES.get(family, {}).get(rest.partition("_")[0])
    if size is not None:
        size.config(family).save_pretrained(folder)
    return size is not None


def load_planned(recipe: str, settings: list[str]) -> TriModeConfig:
    """Return a run to plan; a recipe of a published size needs no model, data or output for it.

    Args:
        recipe: As :func:`~nemodiff_train.config.recipes.load_recipe` takes it.
        settings: Likewise, ``key=value``.
    """
    given = {word.partition("=")[0] for word in settings}
    with TemporaryDirectory() as folder:
        if "start_from" not in given and recipe.isidentifier() and write_config(recipe, Path(folder)):
            assumed = {"start_from": folder, "data": "data", "output": "output"}
            settings = [*settings, *(f"{name}={value}" for name, value in assumed.items() if name not in given)]
        return load_recipe(recipe, settings)
