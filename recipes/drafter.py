"""A drafter for linear self-speculation: adapters on a tri-mode model that act while it drafts, and only then.

The loss and the adapters are Nemotron-Labs-Diffusion's (arXiv 2607.05722, section 3.3).  The paper gives neither
data, nor steps, nor a learning rate for it; those here are a start.
"""

from megatron.bridge.training.config import RNGConfig, TrainingConfig

from nemodiff_train.config.config import TextDatasetConfig, TriModeConfig
from nemodiff_train.config.defaults import adamw, checkpoints, loggers, no_validation, schedule, tokenizer_of
from nemodiff_train.drafter.config import DrafterConfig
from nemodiff_train.model.draft_adapter import DraftLoRA
from nemodiff_train.model.pretrained import model_from
from nemodiff_train.objective import ObjectiveConfig


def recipe(
    start_from: str,
    data: str,
    output: str,
    tensor: int = 1,
    rank: int = 128,
    alpha: int = 512,
) -> TriModeConfig:
    """Adapters of the attention outputs, everything else frozen.

    Args:
        start_from: Megatron checkpoint of the tri-mode model.
        data: Prefix of prepared text; best text that the model itself has written.
        output: The run's folder.
        tensor: Tensor-parallel processes.
        rank: Of the adapters.
        alpha: What they add is scaled by alpha / rank.
    """
    model = model_from(start_from)
    model.tensor_model_parallel_size = tensor
    model.sequence_parallel = tensor > 1
    return TriModeConfig(
        model=model,
        objective=ObjectiveConfig(block_size=model.block_size, shift=model.shift),
        drafter=DrafterConfig(),
        peft=DraftLoRA(dim=rank, alpha=alpha),
        dataset=TextDatasetConfig(seq_length=4096, data=[data], split="100,0,0"),
        train=TrainingConfig(train_iters=2000, global_batch_size=128, micro_batch_size=1),
        optimizer=adamw(1e-4, 1e-5, sharded=True),
        scheduler=schedule(50, style="cosine"),
        checkpoint=checkpoints(output, start_from, every=500),
        logger=loggers(output),
        tokenizer=tokenizer_of(start_from),
        validation=no_validation(),
        rng=RNGConfig(seed=1),
        mixed_precision="bf16_mixed",
    )
