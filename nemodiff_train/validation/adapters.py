"""Adapters: those that can be merged into a model afterwards, on layers where they are, and on their own base."""

from collections.abc import Iterator

from megatron.bridge.peft.lora import LoRA
from megatron.bridge.peft.utils import wildcard_match

from nemodiff_train.config.config import TriModeConfig
from nemodiff_train.model.draft_adapter import DraftLoRA

LAYERS = ("self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2")
"""Linear layers of a transformer block."""


def problems(config: TriModeConfig) -> list[str]:
    """Return what keeps adapters from being trained or merged, one line each; nothing for other runs."""
    if config.peft is None or type(config.peft) is DraftLoRA:  # those are drafter.py's
        return []
    if type(config.peft) is not LoRA:
        return [
            f"peft is {type(config.peft).__name__}, whose adapters cannot be merged into the model afterwards; use "
            "LoRA, as lora_rank does"
        ]
    if min(config.peft.dim, config.peft.alpha) < 1:
        return [f"the adapters have rank {config.peft.dim} and alpha {config.peft.alpha}; both take at least 1"]
    return list(_target_problems(config.peft, config.model.num_layers))


def _target_problems(lora: LoRA, layers: int) -> Iterator[str]:
    names = [f"decoder.layers.{number}.{layer}" for number in range(layers) for layer in LAYERS]
    if not lora.target_modules and not any(_matches(pattern, "output_layer") for pattern in lora.exclude_modules):
        yield "peft adapts the output layer, whose losses would leave it out; add 'output_layer' to exclude_modules"
    for target in lora.target_modules or ():
        if not any(_matches(target, name) for name in names):
            yield (
                f"peft.target_modules has '{target}', which is no linear layer of a transformer block; use "
                f"{', '.join(layer.rpartition('.')[2] for layer in LAYERS)}"
            )


def _matches(pattern: str, name: str) -> bool:
    """Return whether Bridge takes a pattern for a module: by the module's own name, or by its whole name."""
    return pattern == name.rpartition(".")[2] or bool(wildcard_match(pattern, name))
