"""The training objective: noise levels, block sizes, and switches that contradict each other."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from nemodiff_train.errors import nearest
from nemodiff_train.objective import ObjectiveConfig, noise
from nemodiff_train.objective.noise import MASK_SAMPLINGS, WEIGHTINGS, NoiseInputs

if TYPE_CHECKING:
    from nemodiff_train.config.config import TriModeConfig

_DRAWS, _STANDARD_ERRORS, _LOWEST = 2000, 6.0, 0.05
"""Draws per noise level, the error that they may have, and the lowest level that is tried."""


def problems(config: "TriModeConfig") -> Iterator[str]:
    """Yield what is wrong with the objective of a run, one line each."""
    return objective_problems(config.objective, config.dataset.seq_length)


def objective_problems(objective: ObjectiveConfig, seq_length: int) -> Iterator[str]:
    """Yield what is wrong with an objective for samples of ``seq_length`` clean tokens, one line each."""
    lines = [*_noise_problems(objective), *_block_problems(objective, seq_length), *_conflicts(objective)]
    yield from lines or _sampling_problems(objective)


def _noise_problems(objective: ObjectiveConfig) -> Iterator[str]:
    for field, known in (("mask_sampling", MASK_SAMPLINGS), ("weighting", WEIGHTINGS)):
        if (name := getattr(objective, field)) not in known:
            yield f"objective.{field} is '{name}'; use '{"', '".join(known)}'.{nearest(name, known)}"
    low, high = objective.min_noise_level, objective.max_noise_level
    if not 0 < low <= high <= 1:
        yield f"objective.min_noise_level={low} and max_noise_level={high}: use 0 < min <= max <= 1"


def _block_problems(objective: ObjectiveConfig, length: int) -> Iterator[str]:
    schedule, size, sizes = objective.block_schedule, objective.block_size, objective.block_sizes
    if schedule == "fixed":
        if size < 1 or length % size:
            yield (
                f"dataset.seq_length={length} is not a multiple of objective.block_size={size}; change one of them"
            )
    elif not sizes or min(sizes) < 1 or max(sizes) > length:
        yield (
            f"objective.block_sizes={sizes} with block_schedule={schedule}: give sizes between 1 and "
            f"dataset.seq_length={length}"
        )
    elif schedule == "random" and (len(sizes) != 2 or sizes[0] > sizes[1]):
        yield f"objective.block_sizes={sizes}: block_schedule=random takes the lowest and the highest size"
    elif schedule == "curriculum" and objective.block_steps < 1:
        yield "objective.block_steps is not set; block_schedule=curriculum needs the number of steps per size"


def _conflicts(objective: ObjectiveConfig) -> Iterator[str]:
    """Yield the switches that contradict each other, and which of them to change."""
    if objective.complementary:
        if objective.views % 2:
            yield "objective.complementary needs views in pairs; set objective.views=2"
        if objective.fully_masked_fraction > 0:
            yield (
                "objective.complementary with fully_masked_fraction would leave empty views; set "
                "fully_masked_fraction=0"
            )
        highest = 1 - objective.min_noise_level
        if objective.weighting == "inverse" and objective.max_noise_level > highest:
            yield (
                "objective.complementary with weighting=inverse weighs by 1/(1 - t); set max_noise_level to at most "
                f"1 - min_noise_level ({highest:g}), or another weighting"
            )
    counts_per_block = objective.mask_sampling == "exact" and objective.noise_granularity == "block"
    if objective.position_bias_half_life is not None and not counts_per_block:
        yield (
            "objective.position_bias_half_life draws a number of positions per block; set mask_sampling=exact and "
            "noise_granularity=block"
        )
    if objective.clean_attention == "block_causal" and objective.ar_weight > 0 and not objective.shift:
        yield (
            "objective.clean_attention=block_causal lets clean positions see the targets of an AR loss; set "
            "ar_weight=0, or shift=true to keep the AR loss at the last position of each block"
        )
    if objective.stage == "joint" and objective.alpha == 0 and objective.ar_weight == 0:
        yield "objective.alpha and ar_weight are both 0, so that there is nothing to train; set one of them"


def _sampling_problems(objective: ObjectiveConfig) -> Iterator[str]:
    """Yield what is wrong with a mask sampling that a recipe has added, after drawing from it.

    Over many draws at a low, a middle and a high level, each position of two blocks must be masked as often as its
    inclusion probability says, since that is what ``weighting=inverse`` divides by.
    """
    name = objective.mask_sampling
    if MASK_SAMPLINGS[name].__module__ == noise.__name__ or objective.stage == "ar":
        return
    low, high = max(objective.min_noise_level, _LOWEST), objective.max_noise_level
    levels = (low, (low + high) / 2, high)
    try:
        problem = next(filter(None, (_problem_at(objective, level) for level in levels)), None)
    except Exception as error:  # a recipe's function can raise anything
        problem = f"fails: {type(error).__name__}: {error}"
    if problem:
        yield f"objective.mask_sampling={name} {problem}"


def _problem_at(objective: ObjectiveConfig, level: float) -> str | None:
    sample, size = MASK_SAMPLINGS[objective.mask_sampling], objective.block_size
    # Two blocks at one noise level, all positions maskable; every array is [2 * size].
    blocks = np.arange(2 * size) // size
    level_groups = blocks if objective.noise_granularity == "block" else np.zeros_like(blocks)
    inputs = NoiseInputs(np.full(2 * size, level), np.full(2 * size, True), level_groups, blocks, size, objective)
    first, again = (sample(noise.generator(0, 0, 0), inputs) for _ in range(2))
    if not all(np.array_equal(*pair) for pair in zip(first, again, strict=True)):
        return "draws something else from the same generator; draw from the one that it is given alone"
    if first[0].dtype != np.bool_ or not first[0].shape == first[1].shape == blocks.shape:
        return "has to return booleans and probabilities, one for each level"
    # How often a position is masked, and the mean of the probabilities returned for it.
    draws = [sample(noise.generator(0, 0, number), inputs) for number in range(_DRAWS)]
    frequency, stated = (np.mean([draw[index] for draw in draws], axis=0) for index in range(2))
    if not ((stated > 0) & (stated <= 1)).all():
        return f"gives inclusion probabilities that are not above 0 and at most 1 at level {level:.3g}"
    # Positions whose frequency is further from that than chance takes it.
    far = np.abs(frequency - stated) > _STANDARD_ERRORS * np.sqrt(stated * (1 - stated) / _DRAWS) + 1e-9
    if not far.any():
        return None
    position = int(far.argmax())
    return (
        f"masks position {position} of two blocks in {frequency[position]:.1%} of {_DRAWS} draws at level "
        f"{level:.3g}, but says {stated[position]:.1%}; return the probability with which it is masked"
    )
