"""Collect the problems of a configuration and refuse it with all of them at once."""

from collections.abc import Iterator

from nemodiff_train.config.config import TriModeConfig
from nemodiff_train.errors import UserError
from nemodiff_train.planning import rules
from nemodiff_train.validation import (
    adapters,
    data,
    kernels,
    objective,
    output,
    resume,
    settings,
    size,
    start,
)


def check(config: TriModeConfig, world_size: int) -> None:
    """Refuse a configuration that cannot run.

    Args:
        config: As a recipe returns it.
        world_size: Number of processes.

    Raises:
        UserError: One line with every problem.
    """
    if lines := [*problems(config, world_size)]:
        raise UserError("; ".join(lines))


def problems(config: TriModeConfig, world_size: int) -> Iterator[str]:
    """Yield what keeps a configuration from running on ``world_size`` processes, one line per problem."""
    if lines := [*settings.size_problems(config)]:
        yield from lines
        return  # the other rules divide by these sizes
    yield from rules.problems(config, world_size) or size.problems(config, world_size)
    for concern in (settings, objective, kernels, start, resume, adapters, data, output):
        yield from concern.problems(config)
