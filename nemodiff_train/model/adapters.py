"""LoRA on all linear layers, by Bridge: trained separately, merged into the model's weights wherever it is loaded."""

import megatron.bridge.peft.utils as peft_utils
from megatron.bridge.peft.base import PEFT
from megatron.bridge.peft.lora import LoRA
from megatron.bridge.peft.lora_layers import LoRALinear
from megatron.bridge.peft.utils import load_peft_adapter_checkpoint
from megatron.bridge.training.utils.config_utils import apply_run_config_backward_compat
from megatron.bridge.utils.instantiate_utils import InstantiationException, instantiate
from megatron.core import dist_checkpointing
from megatron.core.transformer.module import MegatronModule

from nemodiff_train.errors import UserError
from nemodiff_train.model.checkpoint import Checkpoint
from nemodiff_train.runtime.patches import patch_peft_te_flag

patch_peft_te_flag(peft_utils)


def lora(rank: int) -> LoRA | None:
    """Return adapters of all linear layers, their output scaled by 2; None, to train all weights, for rank 0."""
    return LoRA(dim=rank, alpha=2 * rank) if rank else None


def merge_adapters(models: list[MegatronModule], checkpoint: Checkpoint) -> None:
    """Add trained adapters to the weights of the model that they were trained on.

    Args:
        models: This rank's chunks.
        checkpoint: The adapters' checkpoint.

    Raises:
        UserError: They are not LoRA.
    """
    try:
        adapters = instantiate(apply_run_config_backward_compat(checkpoint.run_config["peft"]))
    except (InstantiationException, AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"'{checkpoint.iteration}' has unusable adapters: {str(error).splitlines()[0]}; take another iteration"
        ) from None
    if type(adapters) is not LoRA:
        raise UserError(
            f"'{checkpoint.iteration}' holds {type(adapters).__name__} adapters, and only LoRA can be merged; export "
            "the adapters with the tool that made them"
        )
    adapters(models, training=False)
    load_adapters(models, checkpoint, adapters)
    for chunk in models:
        for parent in list(chunk.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, LoRALinear):
                    child.to_wrap.weight.data.copy_(child.weight)
                    setattr(parent, name, child.to_wrap)
                    # Bridge let Transformer Engine's layer return the output of its norm as well, for the adapter.
                    for returned in ("return_layernorm_output", "return_layernorm_output_gathered"):
                        if hasattr(child.to_wrap, returned):
                            setattr(child.to_wrap, returned, False)


def load_adapters(models: list[MegatronModule], checkpoint: Checkpoint, adapters: PEFT) -> None:
    """Load the weights of adapters that a model already has.

    Args:
        models: This rank's chunks.
        checkpoint: The adapters' checkpoint, whose contents have been verified.
        adapters: The settings that the adapters were made with.
    """
    folder = str(checkpoint.iteration.absolute())
    metadata = dist_checkpointing.load_content_metadata(folder)
    load_peft_adapter_checkpoint(models, folder, adapters, model_sd_kwargs={"metadata": metadata})
