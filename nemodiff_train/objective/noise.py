"""Which places of a sample are hidden, and how much each of them weighs."""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt


class Noise(NamedTuple):
    """One draw of noise for L places."""

    masked: npt.NDArray[np.bool_]
    """[L] places that the model must restore."""
    weight: npt.NDArray[np.float32]
    """[L] loss weight w(t) at masked places, 0 elsewhere."""


def draw_noise(
    key: tuple[int, int, int], eligible: npt.NDArray[np.bool_], min_level: float, all_masked_share: float = 0.0
) -> Noise:
    """Draw one noise level for the sample and mask each eligible place with that probability.

    t ~ U(min_level, 1); every eligible place is masked independently with probability t; a masked
    place weighs 1/t, the inverse of its inclusion probability (Nemotron-Labs-Diffusion, section 2.1).
    A share of the samples may be taken at t = 1 instead, with weight 1 (TiDAR).

    The draw is a pure function of ``key``: a counter-based generator, no state anywhere.  So every
    rank of every layout, every loader worker and every resumed run sees the same noise.

    Args:
        key: (seed, split, sample index); each non-negative.
        eligible: [L] places that may be masked.
        min_level: Lower end of the noise level.
        all_masked_share: Share of samples at noise level 1.
    """
    generator = np.random.Generator(np.random.Philox(np.random.SeedSequence(key)))
    all_masked = generator.random() < all_masked_share
    level = 1.0 if all_masked else min_level + (1.0 - min_level) * generator.random()
    masked = (generator.random(eligible.shape[0]) < level) & eligible
    return Noise(masked, (masked / level).astype(np.float32))
