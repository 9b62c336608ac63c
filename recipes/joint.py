"""A joint AR + diffusion stage for a model of your own."""

from nemodiff_train.config.config import TriModeConfig
from nemodiff_train.config.datasets import TextDatasetConfig
from nemodiff_train.config.defaults import adamw, base_config, overlap_communication, schedule
from nemodiff_train.model.pretrained import model_from
from nemodiff_train.objective.presets import preset


def joint(
    start_from: str,
    data: str,
    output: str,
    mask_token: str | None = None,
    objective: str = "nemotron",
    precision: str = "bf16_mixed",
) -> TriModeConfig:
    """Train with a published objective under tensor 2 x pipeline 2, with a sharded optimizer.

    Args:
        start_from: The AR model: a Hugging Face directory or name, or a Megatron checkpoint.
        data: Prefix of a data set made by 'nemodiff data prepare'.
        output: Folder of the run.
        mask_token: A token of the tokenizer that never occurs in the data, such as Qwen's ``<|fim_pad|>``; by default
            the checkpoint's mask token, else the tokenizer's.
        objective: One of the presets of docs/objectives.md.
        precision: One of Megatron Bridge's, such as ``bf16_with_fp8_current_scaling_mixed``.
    """
    model = model_from(start_from)
    model.tensor_model_parallel_size = 2
    model.pipeline_model_parallel_size = 2
    config = base_config(
        model,
        preset(objective, mask_token=mask_token),
        TextDatasetConfig(seq_length=4096, data=[data], split="100,0,0"),
        start_from=start_from,
        output=output,
        precision=precision,
        steps=12_500,
        batch_size=512,
        optimizer=adamw(1e-5, 3e-6, sharded=True),
        scheduler=schedule(warmup=0.01, decay=0.2),
    )
    overlap_communication(config)
    return config
