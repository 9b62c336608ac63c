"""The paper's two stages on Qwen 3, for 8 to 256 GPUs: AR training, then joint training from what it made."""

from nemodiff_train.config.published import SIZES, two_stages

qwen3_4b_ar, qwen3_4b_joint = two_stages(SIZES["qwen3"]["4b"])
qwen3_8b_ar, qwen3_8b_joint = two_stages(SIZES["qwen3"]["8b"])
qwen3_14b_ar, qwen3_14b_joint = two_stages(SIZES["qwen3"]["14b"])
