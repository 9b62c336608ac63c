"""The noise of a sample: which positions are masked, and the weight of each one's loss.

Every draw is a pure function of (seed, split, sample index): a counter-based generator without state.  So every rank
of every layout, every loader worker and every resumed run sees the same noise.

Arrays are [L], one value per clean position, unless stated.  A *scope* is what has a noise level of its own: a
sequence, or a block with ``noise_granularity=block``.
"""

import functools
import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from nemodiff_train.objective.config import ObjectiveConfig

Bools = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


# The purpose of a generator; two purposes never share a stream.
_MASKS, _LEVELS, _ORDER, BLOCK_SIZES, EMBEDDINGS = range(5)


class Key(NamedTuple):
    """What the noise of a sample is a function of; non-negative numbers."""

    seed: int
    split: int
    sample: int


class Noise(NamedTuple):
    """One draw of noise for L positions in each of V views."""

    masked: Bools
    """[V, L] positions that the model must restore."""
    weight: npt.NDArray[np.float32]
    """[V, L] loss weight at masked positions, 0 elsewhere."""
    level: npt.NDArray[np.float32]
    """[V, L] noise level t of every position."""


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
    sequences: Ints | None = None,
) -> Noise:
    """Draw noise levels, mask positions, and weigh them.

    With the default switches: t ~ U(min, max) once per sequence; every maskable position is masked independently
    with probability t; a masked position weighs 1/t, the inverse of its inclusion probability
    (Nemotron-Labs-Diffusion, arXiv 2607.05722, section 2.1).

    Args:
        key: What the draw is a function of.
        maskable: [L] positions that may be masked.
        blocks: [L] index of each position's block, 0, 1, ... without gaps.
        objective: The switches.
        block_size: Positions of a full block.
        batch_size: Samples in a global batch; consecutive indices form one (for stratified levels).
        sequences: [L] index of each position's sequence, 0, 1, ... without gaps; None where the sample is one.
    """
    draw = _generator(key, 0, _MASKS, key.sample)
    sequences = np.zeros_like(blocks) if sequences is None else sequences
    scopes = blocks if objective.noise_granularity == "block" else sequences
    fully_masked = (draw.random(int(sequences[-1]) + 1) < objective.fully_masked_fraction)[sequences]
    low, high = objective.min_noise_level, objective.max_noise_level
    views: list[tuple[Bools, Floats, Floats]] = []
    for view in range(objective.views):
        if objective.complementary and view % 2:
            # The complement of the view before: masked where that shows the token, at level 1 - t.
            masked, levels = maskable & ~views[-1][0], 1 - views[-1][2]
        else:
            uniform = _uniforms(key, view, int(scopes[-1]) + 1, objective.noise_level_sampling, batch_size)
            levels = np.where(fully_masked, 1.0, (low + (high - low) * uniform)[scopes])
            masked = _mask(draw, levels, maskable, scopes, blocks, objective, block_size) | (maskable & fully_masked)
        views.append((masked, _weights(masked, levels, maskable, scopes, objective.weighting), levels))
    masked, weight, level = (np.stack(arrays) for arrays in zip(*views, strict=True))
    return Noise(masked, weight.astype(np.float32), level.astype(np.float32))


def _uniforms(key: Key, view: int, scopes: int, sampling: str, batch_size: int) -> Floats:
    """Return [scopes] uniform numbers that a view's levels follow from, related across samples by ``sampling``."""
    if sampling == "antithetic":
        pair = _generator(key, view, _LEVELS, key.sample // 2).random(scopes)
        return pair if key.sample % 2 == 0 else 1 - pair
    draw = _generator(key, view, _LEVELS, key.sample)
    if sampling == "independent":
        return draw.random(scopes)
    # Strata within strata: the levels of one sample cover the range evenly, and so do the samples of a global
    # batch within each stratum.
    step, index_in_batch = divmod(key.sample, batch_size)
    stratum = _order_of_batch(key._replace(sample=step), view, batch_size)[index_in_batch]
    return (draw.permutation(scopes) + (stratum + draw.random(scopes)) / batch_size) / scopes


@functools.lru_cache(maxsize=8)
def _order_of_batch(step: Key, view: int, batch_size: int) -> Ints:
    """Return [batch_size] the stratum of each sample of a global batch."""
    return _generator(step, view, _ORDER, step.sample).permutation(batch_size)


def _mask(
    draw: np.random.Generator,
    levels: Floats,
    maskable: Bools,
    scopes: Ints,
    blocks: Ints,
    objective: ObjectiveConfig,
    block_size: int,
) -> Bools:
    """Return [L] positions masked at their levels."""
    uniform = draw.random(len(levels))
    if objective.mask_sampling == "bernoulli":
        return (uniform < levels) & maskable
    preference = -np.log(-np.log(uniform))  # Gumbel: the k largest are a draw of k without replacement
    if objective.position_bias_half_life is not None:
        preference += _slope(levels, objective.position_bias_half_life, block_size) * _index_within(blocks)
    return _most_preferred(preference, maskable, scopes, _masked_counts(draw, levels, maskable, scopes))


def _slope(levels: Floats, half_life: float, block_size: int) -> Floats:
    """Return the log-preference per position, beta (1 - t) with beta = ln 2 / (half-life * block size).

    (Efficient-DLM, arXiv 2512.14067, section 3.3.)
    """
    return math.log(2) / (half_life * block_size) * (1 - levels)


def _index_within(scopes: Ints) -> Ints:
    """Return [L] the index of each position within its scope; scopes are contiguous."""
    index = np.arange(len(scopes))
    return index - index[np.searchsorted(scopes, scopes)]


def _masked_counts(draw: np.random.Generator, levels: Floats, maskable: Bools, scopes: Ints) -> Ints:
    """Return [scopes] how many positions to mask: t times the maskable ones, rounded at random to the exact mean."""
    count = np.bincount(scopes, maskable)
    level = levels[np.searchsorted(scopes, np.arange(len(count)))]
    return np.ceil(level * count - draw.random(len(count))).astype(np.int64).clip(0)


def _most_preferred(preference: Floats, maskable: Bools, scopes: Ints, counts: Ints) -> Bools:
    """Return [L] the ``counts`` maskable positions of each scope that are preferred most."""
    order = np.lexsort((-preference, ~maskable, scopes))  # by scope, maskable first, then by preference
    masked = np.zeros_like(maskable)
    masked[order] = _index_within(scopes) < counts[scopes]
    return masked & maskable


def _weights(masked: Bools, levels: Floats, maskable: Bools, scopes: Ints, weighting: str) -> Floats:
    """Return [L] loss weights of masked positions, 0 elsewhere."""
    if weighting == "none":
        return masked.astype(np.float64)
    if weighting == "inverse":
        return masked / np.where(masked, levels, 1.0)
    # effective: maskable over masked positions, counted in each scope
    masked_counts = np.bincount(scopes, masked)
    return masked * (np.bincount(scopes, maskable) / np.maximum(masked_counts, 1))[scopes]
