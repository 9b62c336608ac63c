"""Settings of Bridge's that it would stumble over in the middle of a start."""

from typing import Any

AT_LEAST = {
    "train.train_iters": 1,
    "train.global_batch_size": 1,
    "train.micro_batch_size": 1,
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
        if value is not None and value < least:
            found.append(f"{key} is {value}; use {least} or more")
    return found
