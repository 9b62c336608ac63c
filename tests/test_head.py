"""The output layer's loss at chosen places, against PyTorch's own."""

from types import SimpleNamespace

import pytest
import torch


@pytest.fixture(scope="module")
def group() -> torch.distributed.ProcessGroup:
    from nemodiff_train.runtime import init_runtime

    init_runtime()
    from megatron.core import parallel_state

    from nemodiff_train.model.loading import start_model_parallel

    start_model_parallel(1)
    return parallel_state.get_tensor_model_parallel_group()


@pytest.mark.parametrize("rows", [1, 7, 1000])
def test_losses_and_gradients(
    group: torch.distributed.ProcessGroup, monkeypatch: pytest.MonkeyPatch, rows: int
) -> None:
    """Whatever the size of a chunk; places without loss are 0 and send nothing back."""
    from nemodiff_train.model import head

    torch.manual_seed(0)
    positions, batch, hidden, vocabulary = 12, 3, 8, 50
    monkeypatch.setitem(head.LOGIT_CHUNK, "cpu", rows)
    states = torch.randn(positions, batch, hidden, requires_grad=True)
    table = torch.randn(vocabulary + 3, hidden, requires_grad=True)  # three rows of no token
    labels = torch.randint(vocabulary, (batch, positions))
    weights = torch.rand(batch, positions) * (torch.rand(batch, positions) < 0.6)
    layer = SimpleNamespace(sequence_parallel=False, tp_group=group, weight=table)
    places = weights.flatten().nonzero()[:, 0]

    found = head.token_losses(states, labels, places, 4 * weights, vocabulary, layer)
    (found * weights).sum().backward()
    ours = found.detach(), states.grad, table.grad
    states.grad = table.grad = None

    logits = (states.transpose(0, 1) @ table[:vocabulary].T).flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(logits, labels.flatten(), reduction="none").view(batch, positions)
    (expected * weights).sum().backward()
    theirs = torch.where(weights > 0, expected.detach(), 0.0), states.grad, table.grad
    for one, other in zip(ours, theirs, strict=True):
        assert one is not None and other is not None
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_only_what_carries_loss_has_logits_and_once(
    group: torch.distributed.ProcessGroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nemodiff_train.model import head

    monkeypatch.setitem(head.LOGIT_CHUNK, "cpu", 4)
    seen: list[int] = []
    plain = head._logits
    monkeypatch.setattr(head, "_logits", lambda part, table: (seen.append(len(part)), plain(part, table))[1])
    states, table, weights = torch.randn(12, 3, 8, requires_grad=True), torch.randn(50, 8), torch.ones(3, 12)
    layer = SimpleNamespace(sequence_parallel=False, tp_group=group, weight=table)
    losses = head.token_losses(states, torch.zeros(3, 12).long(), torch.arange(0, 36, 4), weights, 50, layer)
    losses.sum().backward()
    assert seen == [4, 4, 1]


def test_a_frozen_output_layer_gets_no_gradient(group: torch.distributed.ProcessGroup) -> None:
    """And the states' is the same as beside one that learns."""
    from nemodiff_train.model.head import token_losses

    torch.manual_seed(0)
    states, table, weights = torch.randn(12, 3, 8, requires_grad=True), torch.randn(50, 8), torch.rand(3, 12)
    labels, places, found = torch.randint(50, (3, 12)), torch.arange(36), []
    for learns in (True, False):
        layer = SimpleNamespace(sequence_parallel=False, tp_group=group, weight=table.clone().requires_grad_(learns))
        (token_losses(states, labels, places, weights, 50, layer) * weights).sum().backward()
        assert (layer.weight.grad is not None) == learns
        found.append(states.grad)
        states.grad = None
    assert torch.equal(found[0], found[1])


def test_the_host_never_waits_for_the_device(group: torch.distributed.ProcessGroup) -> None:
    """Forward and backward with tensors that have no values, of which none can be asked for."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    from nemodiff_train.model.head import token_losses

    with FakeTensorMode():
        table, states = torch.zeros(50, 8, requires_grad=True), torch.zeros(12, 3, 8, requires_grad=True)
        layer = SimpleNamespace(sequence_parallel=False, tp_group=group, weight=table)
        labels, places = torch.zeros(3, 12).long(), torch.zeros(20).long()
        token_losses(states, labels, places, torch.zeros(3, 12), 50, layer).sum().backward()
        assert states.grad is not None and table.grad is not None
