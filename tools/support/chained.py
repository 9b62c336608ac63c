"""Arithmetic problems of two steps, for the study: they compose what the demo's problems ask one at a time."""

import random

from nemodiff_train.evaluation.arithmetic import (
    NAMES,
    THINGS,
    Problem,
    Split,
    different_problems,
    make_problem,
    split_of,
    sums,
)


def chained_problems(split: Split, count: int, seed: int) -> list[Problem]:
    """Draw `count` different problems of two steps.

    Every sum of either split is trained on alone; what is held out is the pair.

    Raises:
        UserError: There are not as many.
    """
    return different_problems(lambda draw: _chained(draw, split), count, f"chained {split} {seed}")


def _chained(draw: random.Random, split: Split) -> Problem:
    """Return a problem of two sums, both trained on alone, whose pair belongs to a split."""
    while True:
        first = draw.choice(sums("train", "+", "gift"))
        seconds = [s for s in sums("train", "-", "giving") if s.left == first.result]
        story = f"{min(first.left, first.right)}+{max(first.left, first.right)} then"
        pairs = [s for s in seconds if split_of(s, story) == split]
        if pairs:
            break
    second, (name, friend, other), things = draw.choice(pairs), draw.sample(NAMES, 3), draw.choice(THINGS)
    return make_problem(
        f"{name} has {first.left} {things}. {friend} gives {name} {first.right} more {things}. "
        f"Then {name} gives {second.right} of them to {other}. How many {things} does {name} have left?",
        f"{name} has {first.left} {things} and gets {first.right} more from {friend}. {first.worked()}. "
        f"Then {name} gives away {second.right}. {second.worked()}. "
        f"So {name} has {second.result} {things} left.",
        second.result,
    )
