"""LoRA on all linear layers, by Bridge: trained apart, merged into the model's weights wherever it is loaded."""

from typing import Any

from megatron.bridge.peft.lora import LoRA
from megatron.bridge.peft.lora_layers import LoRALinear
from megatron.bridge.peft.utils import load_peft_adapter_checkpoint
from megatron.core import dist_checkpointing

from nemodiff_train.model.checkpoint import Checkpoint
from nemodiff_train.runtime.packages import patch_peft_te_flag

patch_peft_te_flag()


def lora(rank: int) -> LoRA | None:
    """Adapters of all linear layers, what they add scaled by 2; None, to train all weights, with rank 0."""
    return LoRA(dim=rank, alpha=2 * rank) if rank else None


def merge_adapters(models: list[Any], checkpoint: Checkpoint) -> None:
    """Add trained adapters to the weights of the model that they were trained on.

    Args:
        models: This rank's chunks.
        checkpoint: Theirs.
    """
    described = checkpoint.run_config["peft"]
    adapters = LoRA(**{name: described[name] for name in ("target_modules", "dim", "alpha")})
    adapters(models, training=False)
    load_adapters(models, checkpoint, adapters)
    for chunk in models:
        for parent in list(chunk.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, LoRALinear):
                    child.to_wrap.weight.data.copy_(child.weight)
                    setattr(parent, name, child.to_wrap)


def load_adapters(models: list[Any], checkpoint: Checkpoint, adapters: LoRA) -> None:
    """Read the weights of adapters that a model has been given.

    Args:
        models: This rank's chunks.
        checkpoint: Theirs; its bytes have been verified.
        adapters: What was given to them.
    """
    folder = str(checkpoint.iteration.absolute())
    metadata = dist_checkpointing.load_content_metadata(folder)
    load_peft_adapter_checkpoint(models, folder, adapters, model_sd_kwargs={"metadata": metadata})
