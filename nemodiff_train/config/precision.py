"""The precision that a run trains in: a name of Bridge's or ``fp32``, or what fits the model and the machine."""

from pathlib import Path

import torch
from megatron.bridge.training.mixed_precision import MIXED_PRECISION_RECIPES, MixedPrecisionConfig, register

from nemodiff_train.config.config import TriModeConfig
from nemodiff_train.errors import UserError
from nemodiff_train.model.checkpoint import Checkpoint
from nemodiff_train.model.headers import read_headers
from nemodiff_train.model.hf_directory import DTYPES


@register
def fp32() -> MixedPrecisionConfig:
    """Return Bridge's settings for weights, activations and gradients in fp32, for which it has no name."""
    return MixedPrecisionConfig(fp32=True, params_dtype=torch.float32, pipeline_dtype=torch.float32)


def precision_of(config: TriModeConfig, cuda: bool) -> str | MixedPrecisionConfig:
    """Return the precision of a run: the one that it names, else the one that it began in, else one that fits.

    Without a name a GPU trains what is stored in 16 bits in bf16, with weights for the optimizer in fp32. All else
    trains in fp32.

    Args:
        config: The run.
        cuda: Whether it runs on a GPU.
    """
    if config.mixed_precision is not None:
        named: str | MixedPrecisionConfig = config.mixed_precision
        return named
    if config.saved:
        return saved_precision(config.saved)
    return "bf16_mixed" if cuda and _stored_dtype(config) != torch.float32 else "fp32"


def is_mixed(precision: str | MixedPrecisionConfig) -> bool:
    """Return whether the optimizer has fp32 weights beside the model's own; an unknown name counts as mixed."""
    if isinstance(precision, str):
        make = MIXED_PRECISION_RECIPES.get(precision)
        return make is None or is_mixed(make())
    return bool(precision.bf16 or precision.fp16)


def slow_precision_warning(precision: str | MixedPrecisionConfig, cuda: bool) -> str | None:
    """Return a line for a run whose precision this machine computes slowly, or None."""
    slow = not cuda and is_mixed(precision)
    return "training in 16 bits is slow on a CPU; mixed_precision=fp32 is many times faster here" if slow else None


def saved_precision(saved: Checkpoint) -> str:
    """Return the precision that a run continues in from one of its checkpoints, unless it names another."""
    model = saved.run_config["model"]
    return "bf16_mixed" if model.get("bf16") else "fp16_mixed" if model.get("fp16") else "fp32"


def _stored_dtype(config: TriModeConfig) -> torch.dtype:
    """Return the dtype of the weights that a run starts from: of the files where there are any, else the model's."""
    dtype: torch.dtype = config.model.params_dtype
    start = Path(config.checkpoint.pretrained_checkpoint or "")
    if not (start / "config.json").is_file():
        return dtype
    try:
        return DTYPES.get(next(iter(read_headers(start).values())).dtype, dtype)
    except UserError:
        return dtype  # damaged, which the start of the run reports
