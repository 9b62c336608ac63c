"""Fine-tuning on conversations: the joint objective on answers alone, all weights or LoRA.

Tokens, batch, length and learning rates are the paper's (Nemotron-Labs-Diffusion, arXiv 2607.05722, section 5); it
gives no shares for the warm-up and the decay of its schedule.
"""

from megatron.bridge.training.config import RNGConfig, TrainingConfig

from nemodiff_train.config.config import ChatDatasetConfig, TriModeConfig
from nemodiff_train.config.defaults import adamw, checkpoints, loggers, no_validation, schedule, tokenizer_of
from nemodiff_train.model.adapters import lora
from nemodiff_train.model.pretrained import model_from
from nemodiff_train.objective import ObjectiveConfig

TOKENS, BATCH, LENGTH = 45 * 10**9, 256, 16384


def recipe(
    start_from: str,
    data: str,
    output: str,
    tensor: int = 1,
    rank: int = 0,
    mask_token: str | None = None,
) -> TriModeConfig:
    """Joint AR + diffusion training on answers.

    Args:
        start_from: The tri-mode model: a Megatron checkpoint, or a Hugging Face directory of one.
        data: Prefix of a data set made by 'nemodiff data prepare --chat' with the model's tokenizer.
        output: The run's folder.
        tensor: Tensor-parallel processes.
        rank: Of LoRA; 0 to train all weights. Takes a Megatron checkpoint.
        mask_token: For a model without one: a token of its tokenizer that never occurs in the data.
    """
    model = model_from(start_from)
    model.tensor_model_parallel_size = tensor
    model.sequence_parallel = tensor > 1
    steps = -(-TOKENS // (BATCH * LENGTH))
    config = TriModeConfig(
        model=model,
        objective=ObjectiveConfig(block_size=model.block_size, shift=model.shift, mask_token=mask_token),
        peft=lora(rank),
        dataset=ChatDatasetConfig(seq_length=LENGTH, data=[data], split="100,0,0"),
        train=TrainingConfig(train_iters=steps, global_batch_size=BATCH, micro_batch_size=1),
        # Adapters take a learning rate that is many times that of all weights.
        optimizer=adamw(1e-4, 1e-5, sharded=True) if rank else adamw(2.5e-6, 2.5e-7, sharded=True),
        scheduler=schedule(warmup=steps // 100, decay=steps // 5),
        checkpoint=checkpoints(output, start_from, every=500),
        logger=loggers(output),
        tokenizer=tokenizer_of(start_from),
        validation=no_validation(),
        rng=RNGConfig(seed=1),
        mixed_precision="bf16_mixed",
    )
    config.checkpoint.most_recent_k = 3
    return config
