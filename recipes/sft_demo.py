"""The demo's tri-mode model learns to converse, in minutes on two cores."""

from megatron.bridge.training.config import RNGConfig, TrainingConfig

from nemodiff_train.config.config import ChatDatasetConfig, TriModeConfig
from nemodiff_train.config.defaults import adamw, checkpoints, loggers, no_validation, schedule, tokenizer_of
from nemodiff_train.model.adapters import lora
from nemodiff_train.model.pretrained import model_from
from nemodiff_train.objective import ObjectiveConfig

STEPS = 300


def recipe(start_from: str, data: str, output: str, rank: int = 0, ranks: int = 1) -> TriModeConfig:
    """Joint training on answers.

    Args:
        start_from: Checkpoints of the demo's joint stage.
        data: Prefix of the demo's conversations, prepared with --chat.
        output: The run's folder.
        rank: Of LoRA; 0 to train all weights.
        ranks: Tensor-parallel processes.
    """
    model = model_from(start_from)
    model.tensor_model_parallel_size = ranks
    return TriModeConfig(
        model=model,
        # The switches of the demo's joint stage.
        objective=ObjectiveConfig(block_size=model.block_size, shift=model.shift, fully_masked_fraction=0.2),
        peft=lora(rank),
        dataset=ChatDatasetConfig(seq_length=256, data=[data], split="100,0,0"),
        train=TrainingConfig(train_iters=STEPS, global_batch_size=8, micro_batch_size=8),
        optimizer=adamw(1e-3, 1e-4),
        scheduler=schedule(10, style="cosine"),
        checkpoint=checkpoints(output, start_from, every=STEPS),
        logger=loggers(output),
        tokenizer=tokenizer_of(start_from),
        validation=no_validation(),
        rng=RNGConfig(seed=1),
    )
