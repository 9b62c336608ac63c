"""Damaged input is read or refused in one line.

Every run tries the same inputs; ``NEMODIFF_FUZZ=100`` tries a hundred times as many, and others each time.
"""

import os
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings

from tests.fuzz_targets import TARGETS, Inputs, attempt

EXAMPLES = {"overrides": 60, "jsonl": 150, "idx": 150, "safetensors": 80, "chat": 4}
TIMES = int(os.environ.get("NEMODIFF_FUZZ", "1"))


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    return Inputs(tmp_path_factory.mktemp("fuzz"))


@pytest.mark.parametrize("name", TARGETS)
def test_only_refusals(name: str, inputs: Inputs) -> None:
    target, answers = TARGETS[name], list[bool]()

    @settings(
        max_examples=EXAMPLES[name] * TIMES,
        derandomize=TIMES == 1,
        database=None,
        deadline=None,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )
    @given(target.strategy(inputs))
    def test(drawn: Any) -> None:
        answers.append(attempt(target, inputs, drawn))

    test()
    assert answers.count(False) > 0
