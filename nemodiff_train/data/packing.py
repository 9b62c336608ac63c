"""Packing: whole items into bins of one size, as full as a greedy pass gets them."""

from bisect import bisect_left, insort

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]


def pack(sizes: Ints, capacity: int, seed: int) -> list[list[int]]:
    """Best fit in random order: each item goes to the open bin that it leaves the least room in.

    The order is random so that a bin is a random draw of items, and what shares a bin has nothing to do with how the
    items were sorted.

    Args:
        sizes: [items] places that each takes, 1 .. ``capacity``.
        capacity: Positions of a bin.
        seed: Of the order; the same bins for the same seed.

    Returns:
        The items of every bin.
    """
    smallest = int(sizes.min())
    bins: list[list[int]] = []
    room: list[tuple[int, int]] = []  # of bins that can still take something: places left and number, sorted
    for item in np.random.default_rng(seed).permutation(len(sizes)).tolist():
        size = int(sizes[item])
        place = bisect_left(room, (size, 0))
        if place < len(room):
            left, number = room.pop(place)
            bins[number].append(item)
        else:
            left, number = capacity, len(bins)
            bins.append([item])
        if left - size >= smallest:
            insort(room, (left - size, number))
    return bins
