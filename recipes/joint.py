"""A joint AR + diffusion stage for a model of your own: bf16, tensor 2 x pipeline 2, sharded optimizer."""

from megatron.bridge.training.config import RNGConfig, TrainingConfig

from nemodiff_train.config.config import TextDatasetConfig, TriModeConfig
from nemodiff_train.config.defaults import (
    adamw,
    checkpoints,
    loggers,
    no_validation,
    overlap,
    schedule,
    sharded,
    tokenizer_of,
)
from nemodiff_train.model.pretrained import model_from
from nemodiff_train.objective.presets import preset

STEPS = 12_500


def recipe(
    start_from: str,
    tokenizer: str,
    data: str,
    output: str,
    mask_token: str | None = None,
    objective: str = "nemotron",
    precision: str = "bf16_mixed",
) -> TriModeConfig:
    """Joint training with a published objective.

    Args:
        start_from: The AR model: a Hugging Face directory or a Megatron checkpoint.
        tokenizer: Its Hugging Face tokenizer.
        data: Prefix of a data set made by 'nemodiff data prepare'.
        output: The run's folder.
        mask_token: A token of the tokenizer that never occurs in the data, such as Qwen's ``<|fim_pad|>``; None for
            the one that the checkpoint or else the tokenizer has.
        objective: One of the presets of docs/objectives.md.
        precision: One of Megatron Bridge's, such as ``bf16_with_fp8_current_scaling_mixed``.
    """
    model = model_from(start_from)
    model.tensor_model_parallel_size = 2
    model.pipeline_model_parallel_size = 2
    return TriModeConfig(
        model=model,
        objective=preset(objective, mask_token=mask_token),
        dataset=TextDatasetConfig(seq_length=4096, data=[data], split="100,0,0"),
        train=TrainingConfig(train_iters=STEPS, global_batch_size=512, micro_batch_size=1),
        optimizer=adamw(1e-5, 3e-6, sharded=True),
        scheduler=schedule(warmup=125, decay=2_500),
        ddp=sharded(),
        comm_overlap=overlap(),
        checkpoint=checkpoints(output, start_from, every=500),
        logger=loggers(output),
        tokenizer=tokenizer_of(tokenizer),
        validation=no_validation(),
        rng=RNGConfig(seed=1),
        mixed_precision=precision,
    )
