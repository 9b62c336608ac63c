"""Settings of Bridge's that it would stumble over in the middle of a start, or take for something else."""

import importlib.util
import math
from typing import Any

AT_LEAST = {
    "train.train_iters": 1,
    "train.global_batch_size": 1,
    "train.micro_batch_size": 1,
    "train.exit_interval": 0,
    "dataset.seq_length": 1,
    "dataset.num_workers": 0,
    "model.tensor_model_parallel_size": 1,
    "model.pipeline_model_parallel_size": 1,
    "model.context_parallel_size": 1,
    "model.num_layers": 1,
    "optimizer.lr": 0,
    "scheduler.lr_warmup_iters": 0,
    "checkpoint.save_interval": 0,
    "logger.log_interval": 1,
    "rng.seed": 1,
}
"""The smallest value of each; those that are not set are not looked at."""


def range_problems(config: Any) -> list[str]:
    """What is too small to be anything, a line each."""
    found = []
    for key, least in AT_LEAST.items():
        section, name = key.split(".")
        value = getattr(getattr(config, section), name)
        if value is not None and not least <= value < math.inf:
            found.append(f"{key} is {value}; use {least} or more")
    return found


def choice_problems(config: Any) -> list[str]:
    """Which words and lists are none that Megatron takes, a line each."""
    found = []
    optimizer = config.optimizer.optimizer
    if optimizer not in ("adam", "sgd") and importlib.util.find_spec("emerging_optimizers") is None:
        found.append(f"optimizer.optimizer is '{optimizer}'; use 'adam' or 'sgd', or install emerging-optimizers")
    if config.checkpoint.ckpt_format != "torch_dist":
        found.append(f"checkpoint.ckpt_format is '{config.checkpoint.ckpt_format}'; use 'torch_dist'")
    shares = [number(share) for share in str(config.dataset.split).split(",")]
    if len(shares) != 3 or not all(0 <= share < math.inf for share in shares) or not sum(shares):
        found.append(f"dataset.split is '{config.dataset.split}'; use three shares, such as '99,1,0'")
    weights = [number(part) for part in config.dataset.data]
    weighted = [not math.isnan(weight) for weight in weights]
    if any(weighted) and weighted != [True, False] * (len(weights) // 2):
        found.append("dataset.data has weights for some; use prefixes alone, or a weight before each")
    if any(weight <= 0 or math.isinf(weight) for weight in weights):
        found.append("dataset.data has a weight that is not above 0")
    return found


def number(text: Any) -> float:
    """What a text stands for; not a number where it stands for none."""
    try:
        return float(text)
    except ValueError:
        return math.nan
