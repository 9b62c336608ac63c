"""Fine-tuning on conversations: the joint objective on answers alone, all weights or LoRA.

Tokens, batch, length and learning rates are the paper's (Nemotron-Labs-Diffusion, arXiv 2607.05722, section 5), which
does not give the shares of warm-up and decay.
"""

from nemodiff_train.config.config import TriModeConfig
from nemodiff_train.config.datasets import ChatDatasetConfig
from nemodiff_train.config.defaults import adamw, base_config, schedule, set_tensor_parallel
from nemodiff_train.model.adapters import lora
from nemodiff_train.model.pretrained import model_from
from nemodiff_train.objective import ObjectiveConfig

TOKENS, BATCH_SIZE, LENGTH = 45 * 10**9, 256, 16384


def sft(
    start_from: str,
    data: str,
    output: str,
    tensor_parallel: int = 1,
    mask_token: str | None = None,
    lora_rank: int = 0,
) -> TriModeConfig:
    """Train on answers with the joint objective.

    Args:
        start_from: The tri-mode model: a Megatron checkpoint, or a Hugging Face directory of one.
        data: Prefix of a data set made by 'nemodiff data prepare --chat' with the model's tokenizer.
        output: Folder of the run.
        tensor_parallel: Tensor-parallel size.
        mask_token: For a model without one: a token of its tokenizer that never occurs in the data.
        lora_rank: Rank of LoRA, which takes a Megatron checkpoint; 0 to train all weights.
    """
    model = set_tensor_parallel(model_from(start_from), tensor_parallel)
    steps = -(-TOKENS // (BATCH_SIZE * LENGTH))
    config = base_config(
        model,
        ObjectiveConfig(block_size=model.block_size, shift=model.shift, mask_token=mask_token),
        ChatDatasetConfig(seq_length=LENGTH, data=[data], split="100,0,0"),
        start_from=start_from,
        output=output,
        steps=steps,
        batch_size=BATCH_SIZE,
        # Adapters take a learning rate that is many times that of all weights.
        optimizer=adamw(1e-4, 1e-5, sharded=True) if lora_rank else adamw(2.5e-6, 2.5e-7, sharded=True),
        scheduler=schedule(warmup=0.01, decay=0.2),
    )
    config.peft = lora(lora_rank)
    config.checkpoint.most_recent_k = 3
    return config
