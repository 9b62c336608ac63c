"""A drafter for linear self-speculation: adapters on a tri-mode model that act while it drafts, and only then.

The loss and the adapters are Nemotron-Labs-Diffusion's (arXiv 2607.05722, section 3.3).  The paper does not give its
data, steps or learning rate; those here are a start.
"""

from nemodiff_train.config.config import TriModeConfig
from nemodiff_train.config.datasets import TextDatasetConfig
from nemodiff_train.config.defaults import adamw, base_config, schedule, set_tensor_parallel
from nemodiff_train.drafter.config import DrafterConfig
from nemodiff_train.model.draft_adapter import DraftLoRA
from nemodiff_train.model.pretrained import model_from
from nemodiff_train.objective import ObjectiveConfig


def drafter(
    start_from: str, data: str, output: str, tensor_parallel: int = 1, lora_rank: int = 128, lora_alpha: int = 512
) -> TriModeConfig:
    """Train adapters of the attention outputs, everything else frozen.

    Args:
        start_from: Megatron checkpoint of the tri-mode model.
        data: Prefix of prepared text; best text that the model itself has written.
        output: Folder of the run.
        tensor_parallel: Tensor-parallel size.
        lora_rank: Rank of the adapters.
        lora_alpha: Scale of the adapters' output, as a multiple of 1 / rank.
    """
    model = set_tensor_parallel(model_from(start_from), tensor_parallel)
    config = base_config(
        model,
        ObjectiveConfig(block_size=model.block_size, shift=model.shift),
        TextDatasetConfig(seq_length=4096, data=[data], split="100,0,0"),
        start_from=start_from,
        output=output,
        steps=2000,
        batch_size=128,
        optimizer=adamw(1e-4, 1e-5, sharded=True),
        scheduler=schedule(0.025, style="cosine"),
    )
    config.drafter, config.peft = DrafterConfig(), DraftLoRA(dim=lora_rank, alpha=lora_alpha)
    return config
