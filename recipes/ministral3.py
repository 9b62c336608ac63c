"""The paper's two stages on Ministral 3, for 8 to 256 GPUs: AR training, then joint training from what it made."""

from nemodiff_train.config.published import Size, two_stages

ministral3_3b_ar, ministral3_3b_joint = two_stages(Size(layers=26, hidden=3072, tensor_parallel=1))
ministral3_8b_ar, ministral3_8b_joint = two_stages(Size(layers=34, hidden=4096, tensor_parallel=4))
ministral3_14b_ar, ministral3_14b_joint = two_stages(Size(layers=40, hidden=5120, tensor_parallel=8))
