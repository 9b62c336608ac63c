"""Schedules as functions of the step (counted from 0): nothing is saved or restored."""

from nemodiff_train.objective.config import ObjectiveConfig
from nemodiff_train.objective.noise import BLOCK_SIZES, generator


def alpha_at(objective: ObjectiveConfig, step: int) -> float:
    """Return the weight of the diffusion loss in a step."""
    if step >= objective.alpha_ramp_steps:
        return objective.alpha
    return objective.alpha * (step + 1) / (objective.alpha_ramp_steps + 1)


def block_size_at(objective: ObjectiveConfig, step: int | None) -> int:
    """Return the positions per block in a step; None for validation, which always uses ``block_size``."""
    if step is None or objective.block_schedule == "fixed":
        return objective.block_size
    if objective.block_schedule == "curriculum":
        return objective.block_sizes[min(step // objective.block_steps, len(objective.block_sizes) - 1)]
    low, high = objective.block_sizes
    return int(generator(objective.seed, BLOCK_SIZES, step).integers(low, high + 1))


def embedding_noise_at(objective: ObjectiveConfig, step: int) -> float:
    """Return the standard deviation of the noise on the mask token's embeddings, relative to the other rows' size."""
    remaining = 1 - step / max(1, objective.mask_embedding_noise_steps)
    return objective.mask_embedding_noise * max(0.0, remaining)
