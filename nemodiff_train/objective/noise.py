"""Which places of a sample are hidden, and how much each of them weighs.

Every draw is a pure function of (seed, split, sample index): a counter-based generator, no state
anywhere.  So every rank of every layout, every loader worker and every resumed run sees the same noise.
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


# What a generator is for; two never share a stream.
_MASKS, _LEVELS, _ORDER, BLOCK_SIZES, EMBEDDINGS = range(5)


class Key(NamedTuple):
    """What the noise of a sample is a function of; each non-negative."""

    seed: int
    split: int
    sample: int


class Noise(NamedTuple):
    """One draw of noise for L places in each of V views."""

    masked: Bools
    """[V, L] places that the model must restore."""
    weight: npt.NDArray[np.float32]
    """[V, L] loss weight at masked places, 0 elsewhere."""
    level: npt.NDArray[np.float32]
    """[V, L] noise level t of every place."""


def generator(seed: int, purpose: int, number: int) -> np.random.Generator:
    """A generator that is a pure function of its key: Philox, whose streams are independent by key.

    Args:
        seed: 0 .. 2**32 - 1.
        purpose: What is drawn, 0 .. 2**32 - 1.
        number: Of what, 0 .. 2**64 - 1.
    """
    return np.random.Generator(np.random.Philox(key=np.array([seed << 32 | purpose, number], dtype=np.uint64)))


def _generator(key: Key, view: int, purpose: int, number: int) -> np.random.Generator:
    return generator(key.seed, (key.split << 24) | (view << 8) | purpose, number)


def draw_noise(
    key: Key,
    eligible: Bools,
    blocks: Ints,
    objective: ObjectiveConfig,
    block_size: int,
    batch_size: int,
    sequences: Ints | None = None,
) -> Noise:
    """Draw noise levels, mask places, and weigh them.

    With the default switches: t ~ U(min, max) once a sequence; every eligible place is masked on its own
    with probability t; a masked place weighs 1/t, the inverse of its inclusion probability
    (Nemotron-Labs-Diffusion, section 2.1).

    Args:
        key: What the draw is a function of.
        eligible: [L] places that may be masked.
        blocks: [L] number of each place's block, 0, 1, ... without gaps.
        objective: The switches.
        block_size: Positions of a full block.
        batch_size: Samples in a global batch; consecutive indices form one (for stratified levels).
        sequences: [L] number of each place's sequence, 0, 1, ... without gaps; None where the sample is one.
    """
    draw = _generator(key, 0, _MASKS, key.sample)
    sequences = np.zeros_like(blocks) if sequences is None else sequences
    full = (draw.random(int(sequences[-1]) + 1) < objective.fully_masked_fraction)[sequences]
    scopes = blocks if objective.noise_granularity == "block" else sequences
    views: list[tuple[Bools, Floats, Floats]] = []
    for view in range(objective.views):
        if objective.complementary and view % 2:
            masked, levels = eligible & ~views[-1][0], 1 - views[-1][2]
        else:
            uniform = _uniforms(key, view, int(scopes[-1]) + 1, objective.noise_level_sampling, batch_size)
            low, high = objective.min_noise_level, objective.max_noise_level
            levels = np.where(full, 1.0, (low + (high - low) * uniform)[scopes])
            masked = _mask(draw, levels, eligible, scopes, blocks, objective, block_size) | (eligible & full)
        views.append((masked, _weights(masked, levels, eligible, scopes, objective.weighting), levels))
    masked, weight, level = (np.stack(parts) for parts in zip(*views, strict=True))
    return Noise(masked, weight.astype(np.float32), level.astype(np.float32))


def _uniforms(key: Key, view: int, scopes: int, how: str, batch_size: int) -> Floats:
    """[scopes] uniform numbers from which a view's levels follow, related across samples as ``how`` says."""
    if how == "antithetic":
        pair = _generator(key, view, _LEVELS, key.sample // 2).random(scopes)
        return pair if key.sample % 2 == 0 else 1 - pair
    own = _generator(key, view, _LEVELS, key.sample)
    if how == "independent":
        return own.random(scopes)
    # Strata within strata: the levels of one sample cover the range evenly, and so do the samples of a global
    # batch within each stratum.
    step, member = divmod(key.sample, batch_size)
    place = _order_of_batch(key._replace(sample=step), view, batch_size)[member]
    return (own.permutation(scopes) + (place + own.random(scopes)) / batch_size) / scopes


@functools.lru_cache(maxsize=8)
def _order_of_batch(step: Key, view: int, batch_size: int) -> Ints:
    """Which stratum each sample of a global batch gets."""
    return _generator(step, view, _ORDER, step.sample).permutation(batch_size)


def _mask(
    draw: np.random.Generator,
    levels: Floats,
    eligible: Bools,
    scopes: Ints,
    blocks: Ints,
    objective: ObjectiveConfig,
    block_size: int,
) -> Bools:
    """[L] places masked at their levels."""
    uniform = draw.random(len(levels))
    if objective.mask_sampling == "bernoulli":
        return (uniform < levels) & eligible
    preference = -np.log(-np.log(uniform))  # Gumbel: the k largest are a draw of k without replacement
    if objective.position_bias_half_life is not None:
        preference += _slope(levels, objective.position_bias_half_life, block_size) * _place_in(blocks)
    return _first_of_each(preference, eligible, scopes, _rounded(draw, levels, eligible, scopes))


def _slope(levels: Floats, position_bias_half_life: float, block_size: int) -> Floats:
    """Log-preference per place, beta (1 - t) with beta = ln 2 / (position_bias_half_life * block) (Efficient-DLM, section 3.3)."""
    return math.log(2) / (position_bias_half_life * block_size) * (1 - levels)


def _place_in(scopes: Ints) -> Ints:
    """[L] how many places of the same scope come before each place; scopes are contiguous."""
    place = np.arange(len(scopes))
    return place - place[np.searchsorted(scopes, scopes)]


def _rounded(draw: np.random.Generator, levels: Floats, eligible: Bools, scopes: Ints) -> Ints:
    """[scopes] number of places to mask: t times the eligible ones, rounded up or down with the right mean."""
    count = np.bincount(scopes, eligible)
    level = levels[np.searchsorted(scopes, np.arange(len(count)))]
    return np.ceil(level * count - draw.random(len(count))).astype(np.int64).clip(0)


def _first_of_each(preference: Floats, eligible: Bools, scopes: Ints, counts: Ints) -> Bools:
    """[L] the ``counts`` eligible places of each scope that are preferred most."""
    order = np.lexsort((-preference, ~eligible, scopes))
    chosen = np.zeros_like(eligible)
    chosen[order] = _place_in(scopes) < counts[scopes]
    return chosen & eligible


def _weights(masked: Bools, levels: Floats, eligible: Bools, scopes: Ints, weighting: str) -> Floats:
    """[L] loss weights of masked places, 0 elsewhere."""
    if weighting == "none":
        return masked.astype(np.float64)
    if weighting == "inverse":
        return masked / np.where(masked, levels, 1.0)
    hidden = np.bincount(scopes, masked)
    return masked * (np.bincount(scopes, eligible) / np.maximum(hidden, 1))[scopes]
