"""The paper's two stages on Ministral 3, for 8 to 256 GPUs: AR training, then joint training from what it made."""

from nemodiff_train.config.published import SIZES, two_stages

ministral3_3b_ar, ministral3_3b_joint = two_stages(SIZES["ministral3"]["3b"])
ministral3_8b_ar, ministral3_8b_joint = two_stages(SIZES["ministral3"]["8b"])
ministral3_14b_ar, ministral3_14b_joint = two_stages(SIZES["ministral3"]["14b"])
