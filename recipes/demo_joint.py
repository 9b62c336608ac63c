"""The demo's joint stage: an AR checkpoint becomes tri-mode, under tensor parallelism over two ranks by default."""

from megatron.bridge.training.config import RNGConfig, TrainingConfig

from nemodiff_train.config.config import TextDatasetConfig, TriModeConfig
from nemodiff_train.config.defaults import adamw, checkpoints, loggers, no_validation, schedule, tokenizer_of
from nemodiff_train.model.pretrained import model_from
from nemodiff_train.objective import ObjectiveConfig

STEPS = 700


def recipe(
    start_from: str, problems: str, code: str, output: str, mask_token: str = "<|mask|>", ranks: int = 2
) -> TriModeConfig:
    """Joint AR + diffusion training.

    Args:
        start_from: The AR model: a Hugging Face directory or a Megatron checkpoint.
        problems: Prefix of the arithmetic problems, prepared with the model's tokenizer.
        code: Prefix of the standard library's source.
        output: The run's folder.
        mask_token: A token of the model's tokenizer that never occurs in text.
        ranks: Tensor-parallel processes.
    """
    model = model_from(start_from)
    model.tensor_model_parallel_size = ranks
    # Two departures from the paper, for a training of minutes: all-masked samples are what a one-shot draft
    # starts from, and the shift lets the noisy half reuse the sums that the AR model can do already.
    objective = ObjectiveConfig(block_size=32, mask_token=mask_token, fully_masked_fraction=0.2, shift=True)
    return TriModeConfig(
        model=model,
        objective=objective,
        dataset=TextDatasetConfig(seq_length=128, data=["0.9", problems, "0.1", code], split="100,0,0"),
        train=TrainingConfig(train_iters=STEPS, global_batch_size=8, micro_batch_size=8),
        optimizer=adamw(5e-3, 2.5e-4),
        scheduler=schedule(30, style="cosine"),
        checkpoint=checkpoints(output, start_from, every=STEPS),
        logger=loggers(output),
        tokenizer=tokenizer_of(start_from),
        validation=no_validation(),
        rng=RNGConfig(seed=1),
    )
