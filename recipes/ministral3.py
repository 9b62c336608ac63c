"""The paper's two stages on Ministral 3, one size and one stage at a time, for 8 to 256 GPUs."""

from nemodiff_train.config.config import TriModeConfig
from nemodiff_train.config.published import Size, two_stage

SIZES = {
    "3b": Size(layers=26, hidden=3072, tensor=1),
    "8b": Size(layers=34, hidden=4096, tensor=4),
    "14b": Size(layers=40, hidden=5120, tensor=8),
}


def recipe(
    size: str,
    stage: str,
    start_from: str,
    tokenizer: str,
    data: str,
    output: str,
    mask_token: str | None = None,
    precision: str = "bf16_mixed",
) -> TriModeConfig:
    """AR pretraining on one trillion tokens, or joint training on 300 billion, at block size 32.

    Args:
        size: ``3b``, ``8b`` or ``14b``.
        stage: ``ar`` or ``joint``.
        start_from: The model of that size: a Hugging Face directory, or the Megatron checkpoint that
            'nemodiff convert import' or the first stage made.
        tokenizer: Its Hugging Face tokenizer, or a Megatron checkpoint that has it.
        data: Prefix of a data set made by 'nemodiff data prepare'.
        output: The run's folder.
        mask_token: Of the joint stage; None for the one that the checkpoint or else the tokenizer has.
        precision: One of Megatron Bridge's, such as ``bf16_with_fp8_current_scaling_mixed``.
    """
    return two_stage(SIZES, size, stage, start_from, tokenizer, data, output, mask_token, precision)
