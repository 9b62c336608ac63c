"""Pack whole items into bins of one size."""

from bisect import bisect_left, insort

import numpy as np
import numpy.typing as npt


def pack(sizes: npt.NDArray[np.int64], capacity: int, seed: int) -> list[list[int]]:
    """Pack by best fit in random order: each item goes to the open bin that it leaves the least room in.

    The order is random so that a bin is a random draw of items, however the items were sorted.

    Args:
        sizes: [items] positions that each takes, 1 .. ``capacity``.
        capacity: Number of positions in a bin.
        seed: Seed of the order; the same seed gives the same bins.

    Returns:
        The item numbers in each bin.
    """
    smallest = int(sizes.min())
    bins: list[list[int]] = []
    open_bins: list[tuple[int, int]] = []  # (positions left, bin number), sorted
    for item in np.random.default_rng(seed).permutation(len(sizes)).tolist():
        size = int(sizes[item])
        best = bisect_left(open_bins, (size, 0))
        if best < len(open_bins):
            left, number = open_bins.pop(best)
            bins[number].append(item)
        else:
            left, number = capacity, len(bins)
            bins.append([item])
        if left - size >= smallest:
            insort(open_bins, (left - size, number))
    return bins
