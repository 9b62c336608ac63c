"""The paper's two stages on Qwen 3, for 8 to 256 GPUs: AR training, then joint training from what it made."""

from nemodiff_train.config.published import Size, two_stages

qwen3_4b_ar, qwen3_4b_joint = two_stages(Size(layers=36, hidden=2560, tensor_parallel=1))
qwen3_8b_ar, qwen3_8b_joint = two_stages(Size(layers=36, hidden=4096, tensor_parallel=4))
qwen3_14b_ar, qwen3_14b_joint = two_stages(Size(layers=40, hidden=5120, tensor_parallel=8))
