"""Between the loader and the gradient the host never waits for the device: it reads no value of a tensor there.

Shown with tensors that have no values. The test of the output layer is in tests/test_head.py.
"""

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode

from nemodiff_train.attention import kernels
from nemodiff_train.attention.context_parallel import ContextParallelShard
from nemodiff_train.attention.plan import segmented_plan
from nemodiff_train.objective import ObjectiveConfig
from nemodiff_train.objective.loss import loss_weights, report

LENGTH, ROWS = 96, 2


@pytest.fixture
def fake() -> FakeTensorMode:
    return FakeTensorMode(allow_non_fake_inputs=True)


def batch() -> dict[str, Tensor]:
    """The shapes of a micro-batch of one noisy view."""
    halves = {"loss_mask": 2 * LENGTH, "maskable": LENGTH, "noise_level": LENGTH, "index_in_block": LENGTH}
    return {name: torch.zeros(ROWS, positions) for name, positions in halves.items()}


def test_reading_a_value_is_noticed(fake: FakeTensorMode) -> None:
    with fake:
        values = torch.zeros(4)
        with pytest.raises(DataDependentOutputException):
            values.sum().item()
        with pytest.raises(DynamicOutputShapeException):
            values[values > 0]


@pytest.mark.parametrize("shard", [ContextParallelShard(), ContextParallelShard(0, 2)])
def test_plans_of_samples_that_differ(fake: FakeTensorMode, shard: ContextParallelShard) -> None:
    """Plans with their block mask, after the first one of a shape."""
    segment_ids = torch.zeros(ROWS, 3, LENGTH, dtype=torch.int32)
    segmented_plan(1, segment_ids, False, 16, shard, False).block_mask((32, 32))
    with fake:
        mask = segmented_plan(1, torch.empty_like(segment_ids), False, 16, shard, False).block_mask((32, 32))
        assert mask.kv_indices.shape[0] == ROWS and mask.q_indices is not None


def test_losses_and_what_is_told_of_them(fake: FakeTensorMode) -> None:
    from nemodiff_train.runtime import init_runtime

    init_runtime()
    from nemodiff_train.objective.breakdown import Breakdown

    with fake:
        samples, losses = batch(), torch.zeros(ROWS, 2 * LENGTH)
        objective = ObjectiveConfig()
        weights, denominator = loss_weights(samples, objective, 0.3, 1.0)
        report(losses, samples, (losses * weights).sum(), denominator, objective)
        breakdown = Breakdown()
        breakdown.add(samples, losses)
        breakdown.add(samples, losses)


def test_attention_over_a_plan(fake: FakeTensorMode) -> None:
    segment_ids = torch.zeros(ROWS, 3, LENGTH, dtype=torch.int32)
    plan = segmented_plan(1, segment_ids, False, 16, ContextParallelShard(), False)
    assert plan.query_tiles
    with fake:
        states = [torch.zeros(ROWS, heads, 2 * LENGTH, 8, requires_grad=True) for heads in (4, 2, 2)]
        kernels.attend(*states, plan, None, kernels.select_kernel(states[0].device, False)).sum().backward()
        assert states[0].grad is not None
