"""The two stages of the paper on a published model: what the recipes of real sizes share."""

from collections.abc import Mapping
from dataclasses import dataclass

from megatron.bridge.training.config import RNGConfig, TrainingConfig

from nemodiff_train.config.config import TextDatasetConfig, TriModeConfig
from nemodiff_train.config.defaults import (
    adamw,
    checkpoints,
    enable_async_save,
    loggers,
    no_validation,
    overlap,
    schedule,
    sharded,
    tokenizer_of,
)
from nemodiff_train.errors import UserError, nearest
from nemodiff_train.model.pretrained import model_from
from nemodiff_train.objective import ObjectiveConfig
from nemodiff_train.objective.presets import preset

TOKENS = {"ar": 10**12, "joint": 3 * 10**11}
"""Clean tokens of a stage (Nemotron-Labs-Diffusion, arXiv 2607.05722, section 5)."""

BATCH, LENGTH = 512, 4096
"""Samples of a step and clean tokens of a sample (ibid.)."""


@dataclass(frozen=True)
class Size:
    """One published size: what tells its checkpoint from another's, and how it is spread over GPUs."""

    layers: int
    hidden: int
    tensor: int
    """Tensor-parallel size. Key-value heads, batch and 8 to 256 GPUs are all multiples of it."""


def two_stage(
    sizes: Mapping[str, Size],
    size: str,
    stage: str,
    start_from: str,
    tokenizer: str,
    data: str,
    output: str,
    mask_token: str | None,
    precision: str,
) -> TriModeConfig:
    """The configuration of one stage, for 8 to 256 GPUs of 80 GB.

    Tokens, learning rates, batch, length and weight decay are the paper's.  It gives no shares for the
    warm-up and the decay of its schedule; 1% and 20% are those of Megatron Bridge's public recipe.

    Raises:
        UserError: Unknown size or stage, or ``start_from`` is of another size.
    """
    for name, value, known in (("size", size, [*sizes]), ("stage", stage, [*TOKENS])):
        if value not in known:
            raise UserError(f"unknown {name} '{value}'; known: {', '.join(known)}.{nearest(value, known)}")
    shape = sizes[size]
    model = model_from(start_from)
    if (model.num_layers, model.hidden_size) != (shape.layers, shape.hidden):
        raise UserError(
            f"'{start_from}' has {model.num_layers} layers of width {model.hidden_size}, but size={size} has "
            f"{shape.layers} of {shape.hidden}; name the model's own size, or copy recipes/joint.py for another model"
        )
    model.tensor_model_parallel_size = shape.tensor
    model.sequence_parallel = shape.tensor > 1
    steps = -(-TOKENS[stage] // (BATCH * LENGTH))
    objective = ObjectiveConfig(stage="ar") if stage == "ar" else preset("nemotron", mask_token=mask_token)
    config = TriModeConfig(
        model=model,
        objective=objective,
        dataset=TextDatasetConfig(seq_length=LENGTH, data=[data], split="100,0,0"),
        train=TrainingConfig(train_iters=steps, global_batch_size=BATCH, micro_batch_size=1),
        optimizer=adamw(1e-5, 3e-6, sharded=True),
        scheduler=schedule(warmup=steps // 100, decay=steps // 5),
        ddp=sharded(),
        comm_overlap=overlap(),
        checkpoint=checkpoints(output, start_from, every=500),
        logger=loggers(output),
        tokenizer=tokenizer_of(tokenizer),
        validation=no_validation(),
        rng=RNGConfig(seed=1),
        mixed_precision=precision,
    )
    config.checkpoint.most_recent_k = 3  # a stage makes hundreds, each with the optimizer state
    enable_async_save(config.checkpoint)
    return config
