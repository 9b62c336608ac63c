"""A drafter for the demo's tri-mode model, in minutes on two cores."""

from megatron.bridge.training.config import RNGConfig, TrainingConfig

from nemodiff_train.config.config import TextDatasetConfig, TriModeConfig
from nemodiff_train.config.defaults import adamw, checkpoints, loggers, no_validation, schedule, tokenizer_of
from nemodiff_train.drafter.config import DrafterConfig
from nemodiff_train.model.draft_adapter import DraftLoRA
from nemodiff_train.model.pretrained import model_from
from nemodiff_train.objective import ObjectiveConfig

STEPS = 600


def recipe(start_from: str, problems: str, output: str) -> TriModeConfig:
    """Adapters of full rank on the demo's attention outputs.

    Args:
        start_from: Checkpoints of the demo's joint stage.
        problems: Prefix of the arithmetic problems.
        output: The run's folder.
    """
    model = model_from(start_from)
    return TriModeConfig(
        model=model,
        objective=ObjectiveConfig(block_size=model.block_size, shift=model.shift),
        drafter=DrafterConfig(),
        peft=DraftLoRA(dim=128, alpha=512),
        dataset=TextDatasetConfig(seq_length=128, data=[problems], split="100,0,0"),
        train=TrainingConfig(train_iters=STEPS, global_batch_size=16, micro_batch_size=8),
        optimizer=adamw(4e-3, 2e-4),
        scheduler=schedule(10, style="cosine"),
        checkpoint=checkpoints(output, start_from, every=STEPS),
        logger=loggers(output),
        tokenizer=tokenizer_of(start_from),
        validation=no_validation(),
        rng=RNGConfig(seed=1),
    )
