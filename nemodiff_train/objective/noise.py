"""The noise of a sample: which positions are masked, and the weight of each one's loss.

Every draw is a pure function of (seed, split, sample index): a counter-based generator without state.  So every rank
of every layout, every loader worker and every resumed run sees the same noise.

Arrays are [L], one value per clean position, unless stated.  A *level group* has a noise level of its own: a
sequence, or a block with ``noise_granularity=block``.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from nemodiff_train.objective.config import ObjectiveConfig

Bools = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


# The purpose of a generator; two purposes never share a stream.
_MASKS, _LEVELS, _ORDER, BLOCK_SIZES, EMBEDDINGS, DRAFTS = range(6)


class Key(NamedTuple):
    """Key of a sample's noise; non-negative numbers."""

    seed: int
    split: int
    sample: int


class Noise(NamedTuple):
    """One draw of noise for L positions in each of V views."""

    masked: Bools
    """[V, L] positions that the model must restore."""
    weight: npt.NDArray[np.float32]
    """[V, L] weight of the loss at masked positions, 0 elsewhere."""
    level: npt.NDArray[np.float32]
    """[V, L] noise level t of every position."""


class NoiseInputs(NamedTuple):
    """Inputs of the functions that mask and weigh the positions of a view; arrays are [L]."""

    levels: Floats
    """Noise level t of each position, above 0 and at most 1."""
    maskable: Bools
    """Positions that may be masked."""
    level_groups: Ints
    """Index of the level group of each position, 0, 1, ... without gaps."""
    blocks: Ints
    """The same of the block."""
    block_size: int
    """Positions of a full block."""
    objective: ObjectiveConfig


MaskSampling = Callable[[np.random.Generator, NoiseInputs], tuple[Bools, Floats]]
"""Draws masks: [L] positions, of which the maskable ones are masked, and [L] the probability with which each maskable
one is masked at its level. A function of its arguments alone."""

Weighting = Callable[[Bools, Floats, NoiseInputs], Floats]
"""Returns [L] weights of masked positions, 0 elsewhere, from [L] masked positions and inclusion probabilities."""


def generator(seed: int, purpose: int, number: int) -> np.random.Generator:
    """Return a generator that is a pure function of its key: Philox, whose streams are independent by key.

    Args:
        seed: 0 .. 2**32 - 1.
        purpose: What is drawn, 0 .. 2**32 - 1.
        number: Index of the sample, step or pair that it is drawn for, 0 .. 2**64 - 1.
    """
    return np.random.Generator(np.random.Philox(key=np.array([seed << 32 | purpose, number], dtype=np.uint64)))


def _generator(key: Key, view: int, purpose: int, number: int) -> np.random.Generator:
    return generator(key.seed, (key.split << 24) | (view << 8) | purpose, number)


def draw_noise(
    key: Key,
    maskable: Bools,
    blocks: Ints,
    objective: ObjectiveConfig,
    block_size: int,
    batch_size: int,
    sequences: Ints | None,
) -> Noise:
    """Draw noise levels, masked positions and their weights.

    With the default switches: t ~ U(min, max) once per sequence; every maskable position is masked independently
    with probability t; a masked position weighs 1/t, the inverse of its inclusion probability
    (Nemotron-Labs-Diffusion, arXiv 2607.05722, section 2.1).

    Args:
        key: What the draw is a function of.
        maskable: [L] positions that may be masked.
        blocks: [L] index of each position's block, 0, 1, ... without gaps.
        objective: The switches.
        block_size: Positions of a full block.
        batch_size: Samples in a global batch; consecutive indices form one (for stratified and shared levels).
        sequences: [L] index of each position's sequence, 0, 1, ... without gaps; None where the sample is one.
    """
    draw = _generator(key, 0, _MASKS, key.sample)
    sequences = np.zeros_like(blocks) if sequences is None else sequences
    level_groups = blocks if objective.noise_granularity == "block" else sequences
    # [L] whether the sequence of a position is one of the fully masked ones.
    fully_masked = (draw.random(int(sequences[-1]) + 1) < objective.fully_masked_fraction)[sequences]
    low, high = objective.min_noise_level, objective.max_noise_level
    inputs_by_view: list[NoiseInputs] = []
    # Per view, [L] each: the masked positions, and the probability with which a maskable one is masked at its level.
    masks: list[Bools] = []
    probabilities: list[Floats] = []
    for view in range(objective.views):
        if objective.complementary and view % 2:
            # The complement of the view before: masked where that shows the token, at level 1 - t.
            inputs_by_view.append(inputs_by_view[-1]._replace(levels=1 - inputs_by_view[-1].levels))
            masks.append(maskable & ~masks[-1])
            probabilities.append(1 - probabilities[-1])
            continue
        # [groups] uniform numbers, the level of each group, and [L] that of each position.
        uniform = _uniforms(key, view, int(level_groups[-1]) + 1, objective.noise_level_sampling, batch_size)
        levels = np.where(fully_masked, 1.0, (low + (high - low) * uniform)[level_groups])
        inputs_by_view.append(NoiseInputs(levels, maskable, level_groups, blocks, block_size, objective))
        masked, probability = MASK_SAMPLINGS[objective.mask_sampling](draw, inputs_by_view[-1])
        masks.append(maskable & (masked | fully_masked))
        probabilities.append(np.where(fully_masked, 1.0, probability))
    weights = map(WEIGHTINGS[objective.weighting], masks, probabilities, inputs_by_view)
    return Noise(
        np.stack(masks),
        np.stack(list(weights)).astype(np.float32),
        np.stack([inputs.levels for inputs in inputs_by_view]).astype(np.float32),
    )


def _uniforms(key: Key, view: int, groups: int, sampling: str, batch_size: int) -> Floats:
    """Return [groups] uniform numbers that a view's levels follow from, related across samples by ``sampling``."""
    if sampling == "antithetic":
        pair = _generator(key, view, _LEVELS, key.sample // 2).random(groups)
        return pair if key.sample % 2 == 0 else 1 - pair
    step, index_in_batch = divmod(key.sample, batch_size)
    if sampling == "shared":
        return np.full(groups, _generator(key, view, _LEVELS, step).random())
    draw = _generator(key, view, _LEVELS, key.sample)
    if sampling == "independent":
        return draw.random(groups)
    # Strata within strata: the levels of one sample cover the range evenly, and so do the samples of a global
    # batch within each stratum.
    stratum = _order_of_batch(key._replace(sample=step), view, batch_size)[index_in_batch]
    return (draw.permutation(groups) + (stratum + draw.random(groups)) / batch_size) / groups


@functools.lru_cache(maxsize=8)
def _order_of_batch(step: Key, view: int, batch_size: int) -> Ints:
    """Return the stratum of each sample of a global batch: [batch_size]."""
    return _generator(step, view, _ORDER, step.sample).permutation(batch_size)


def _bernoulli(draw: np.random.Generator, inputs: NoiseInputs) -> tuple[Bools, Floats]:
    """Mask each position on its own."""
    return draw.random(len(inputs.levels)) < inputs.levels, inputs.levels


def _exact(draw: np.random.Generator, inputs: NoiseInputs) -> tuple[Bools, Floats]:
    """Mask t times the maskable positions of each level group, with a half-life late ones of a block more often."""
    levels, maskable, level_groups = inputs.levels, inputs.maskable, inputs.level_groups
    # [L] Gumbel noise: the k positions with the largest are a draw of k without replacement.
    preference = -np.log(-np.log(draw.random(len(levels))))
    half_life = inputs.objective.position_bias_half_life
    if half_life is not None:
        # [L] beta (1 - t) per position, beta = ln 2 / (half-life * block size) (arXiv 2512.14067, section 3.3).
        slope = math.log(2) / (half_life * inputs.block_size) * (1 - levels)
        preference += slope * _index_within(inputs.blocks)

    # [groups] number of positions to mask: t times the maskable ones, rounded at random to the exact mean.
    counts = np.bincount(level_groups, maskable)
    level = levels[np.searchsorted(level_groups, np.arange(len(counts)))]
    counts = np.ceil(level * counts - draw.random(len(counts))).astype(np.int64).clip(0)

    # [L] the positions by group, maskable ones first, then by preference: the first ``counts`` of each are masked.
    order = np.lexsort((-preference, ~maskable, level_groups))
    masked = np.zeros_like(maskable)
    masked[order] = _index_within(level_groups) < counts[level_groups]
    return masked & maskable, levels


def _index_within(segments: Ints) -> Ints:
    """Return [L] the index of each position within its level group or block; these are contiguous."""
    index = np.arange(len(segments))
    return index - index[np.searchsorted(segments, segments)]


def _inverse(masked: Bools, probability: Floats, inputs: NoiseInputs) -> Floats:
    return masked / np.where(masked, probability, 1.0)


def _effective(masked: Bools, probability: Floats, inputs: NoiseInputs) -> Floats:
    groups = inputs.level_groups
    # [groups] maskable over masked positions.
    weights = np.bincount(groups, inputs.maskable) / np.maximum(np.bincount(groups, masked), 1)
    return masked * weights[groups]


def _unweighted(masked: Bools, probability: Floats, inputs: NoiseInputs) -> Floats:
    return masked.astype(np.float64)


MASK_SAMPLINGS: dict[str, MaskSampling] = {"bernoulli": _bernoulli, "exact": _exact}
"""Ways to draw masks by ``objective.mask_sampling``; a recipe may add its own."""

WEIGHTINGS: dict[str, Weighting] = {"inverse": _inverse, "effective": _effective, "none": _unweighted}
"""Weights of the diffusion loss by ``objective.weighting``; a recipe may add its own."""
