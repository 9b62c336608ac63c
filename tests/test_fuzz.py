"""A short, always equal pass of every fuzzing target; tools/fuzz goes on for as long as it is let."""

from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings

from tests.fuzz_targets import TARGETS, World, attempt

EXAMPLES = {"overrides": 60, "jsonl": 150, "idx": 150, "safetensors": 80, "chat": 4}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("fuzz"))


@pytest.mark.parametrize("name", TARGETS)
def test_only_refusals(name: str, world: World) -> None:
    target, answers = TARGETS[name], list[bool]()

    @settings(
        max_examples=EXAMPLES[name],
        derandomize=True,
        database=None,
        deadline=None,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )
    @given(target.inputs(world))
    def test(drawn: Any) -> None:
        answers.append(attempt(target, world, drawn))

    test()
    assert answers.count(False) > 0
