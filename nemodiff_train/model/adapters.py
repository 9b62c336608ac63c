"""LoRA on all linear layers, by Bridge: trained apart, merged into the model's weights wherever it is loaded."""

from pathlib import Path
from typing import Any

from megatron.bridge.peft.lora import LoRA
from megatron.bridge.peft.lora_layers import LoRALinear
from megatron.bridge.peft.utils import load_peft_adapter_checkpoint
from megatron.core import dist_checkpointing

from nemodiff_train.errors import UserError
from nemodiff_train.model.checkpoint import is_megatron_checkpoint, newest_iteration, run_config
from nemodiff_train.runtime.packages import patch_peft_te_flag

patch_peft_te_flag()


def lora(rank: int) -> LoRA | None:
    """Adapters of all linear layers, what they add scaled by 2; None, to train all weights, with rank 0."""
    return LoRA(dim=rank, alpha=2 * rank) if rank else None


def base_of(checkpoint: Path) -> Path:
    """The checkpoint that adapters were trained on.

    Raises:
        UserError: It is no longer there.
    """
    base = Path(str(run_config(checkpoint)["checkpoint"]["pretrained_checkpoint"]))
    if not is_megatron_checkpoint(base):
        raise UserError(
            f"'{checkpoint}' holds adapters of '{base}', which is not there; run from the folder that the "
            "training ran in, or put the checkpoint back"
        )
    return newest_iteration(base, read=True)


def merge_adapters(models: list[Any], checkpoint: Path) -> None:
    """Add trained adapters to the weights of the model that they were trained on.

    Args:
        models: This rank's chunks.
        checkpoint: That of the adapters.
    """
    described = run_config(checkpoint)["peft"]
    adapters = LoRA(**{name: described[name] for name in ("target_modules", "dim", "alpha")})
    adapters(models, training=False)
    load_adapters(models, checkpoint, adapters)
    for chunk in models:
        for parent in list(chunk.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, LoRALinear):
                    child.to_wrap.weight.data.copy_(child.weight)
                    setattr(parent, name, child.to_wrap)


def load_adapters(models: list[Any], checkpoint: Path, adapters: LoRA) -> None:
    """Read the weights of adapters that a model has been given.

    Args:
        models: This rank's chunks.
        checkpoint: A folder of ``iter_*`` (the newest is taken) or one of them.
        adapters: What was given to them.
    """
    folder = str(newest_iteration(checkpoint, read=True).absolute())
    metadata = dist_checkpointing.load_content_metadata(folder)
    load_peft_adapter_checkpoint(models, folder, adapters, model_sd_kwargs={"metadata": metadata})
