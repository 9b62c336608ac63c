"""The output layer's loss at selected positions, against PyTorch's own."""

from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode


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
    """The size of a chunk does not matter; positions without loss are 0 and have no gradient."""
    from nemodiff_train.model import head

    torch.manual_seed(0)
    positions, batch, hidden, vocab_size = 12, 3, 8, 50
    monkeypatch.setitem(head.LOGIT_CHUNK, "cpu", rows)
    states = torch.randn(positions, batch, hidden, requires_grad=True)
    weight = torch.randn(vocab_size + 3, hidden, requires_grad=True)  # three rows of padding
    labels = torch.randint(vocab_size, (batch, positions))
    loss_weights = torch.rand(batch, positions) * (torch.rand(batch, positions) < 0.6)
    layer = SimpleNamespace(sequence_parallel=False, tp_group=group, weight=weight)
    indices = loss_weights.flatten().nonzero()[:, 0]

    losses = head.token_losses(states, labels, indices, 4 * loss_weights, vocab_size, layer, weight)
    (losses * loss_weights).sum().backward()
    ours = losses.detach(), states.grad, weight.grad
    states.grad = weight.grad = None

    logits = (states.transpose(0, 1) @ weight[:vocab_size].T).flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(logits, labels.flatten(), reduction="none").view(batch, positions)
    (expected * loss_weights).sum().backward()
    theirs = torch.where(loss_weights > 0, expected.detach(), 0.0), states.grad, weight.grad
    for one, other in zip(ours, theirs, strict=True):
        assert one is not None and other is not None
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_only_what_carries_loss_has_logits_and_once(
    group: torch.distributed.ProcessGroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nemodiff_train.model import head

    monkeypatch.setitem(head.LOGIT_CHUNK, "cpu", 4)
    chunks: list[int] = []
    plain = head._logits
    monkeypatch.setattr(head, "_logits", lambda part, weight: (chunks.append(len(part)), plain(part, weight))[1])
    states, weight, loss_weights = torch.randn(12, 3, 8, requires_grad=True), torch.randn(50, 8), torch.ones(3, 12)
    layer = SimpleNamespace(sequence_parallel=False, tp_group=group, weight=weight)
    losses = head.token_losses(
        states, torch.zeros(3, 12).long(), torch.arange(0, 36, 4), loss_weights, 50, layer, weight
    )
    losses.sum().backward()
    assert chunks == [4, 4, 1]


@pytest.mark.parametrize("padding", [0, 3])
def test_a_weight_is_cut_only_where_it_is_padded(group: torch.distributed.ProcessGroup, padding: int) -> None:
    """A cut costs a copy of the whole gradient."""
    from nemodiff_train.model.head import token_losses

    states, weight = torch.randn(4, 1, 8), torch.randn(50 + padding, 8, requires_grad=True)
    layer = SimpleNamespace(sequence_parallel=False, tp_group=group, weight=weight)
    losses = token_losses(states, torch.zeros(1, 4).long(), torch.arange(4), torch.ones(1, 4), 50, layer, weight)
    operations, waiting = [], [losses.grad_fn]
    while waiting:
        if (operation := waiting.pop()) is not None:
            operations.append(operation.name())
            waiting.extend(before for before, _ in operation.next_functions)
    assert "torch::autograd::AccumulateGrad" in operations
    assert ("SliceBackward0" in operations) == bool(padding)


def test_a_frozen_output_layer_gets_no_gradient(group: torch.distributed.ProcessGroup) -> None:
    """The gradient of the states is the same as with one that is trained."""
    from nemodiff_train.model.head import token_losses

    torch.manual_seed(0)
    states, weight, loss_weights = torch.randn(12, 3, 8, requires_grad=True), torch.randn(50, 8), torch.rand(3, 12)
    labels, indices, gradients = torch.randint(50, (3, 12)), torch.arange(36), []
    for trains in (True, False):
        layer = SimpleNamespace(sequence_parallel=False, tp_group=group, weight=weight.clone().requires_grad_(trains))
        (token_losses(states, labels, indices, loss_weights, 50, layer, layer.weight) * loss_weights).sum().backward()
        assert (layer.weight.grad is not None) == trains
        gradients.append(states.grad)
        states.grad = None
    assert torch.equal(gradients[0], gradients[1])


def test_the_host_never_waits_for_the_device(group: torch.distributed.ProcessGroup) -> None:
    """Forward and backward run on tensors without values, where reading one is an error."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    from nemodiff_train.model.head import token_losses

    with FakeTensorMode():
        weight, states = torch.zeros(50, 8, requires_grad=True), torch.zeros(12, 3, 8, requires_grad=True)
        layer = SimpleNamespace(sequence_parallel=False, tp_group=group, weight=weight)
        labels, indices = torch.zeros(3, 12).long(), torch.zeros(20).long()
        token_losses(states, labels, indices, torch.zeros(3, 12), 50, layer, weight).sum().backward()
        assert states.grad is not None and weight.grad is not None


def test_what_a_gpu_does_otherwise(group: torch.distributed.ProcessGroup, monkeypatch: pytest.MonkeyPatch) -> None:
    """Longer chunks, their gradients of the weight added up in fp32 at once, and PyTorch's norm.

    On tensors without values.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.overrides import _pop_mode_temporarily

    from nemodiff_train.model import head
    from nemodiff_train.model.norm import RMSNorm

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # torch would start CUDA
    # The CPU in the place of CUDA would turn the name back.
    with FakeTensorMode(), _pop_mode_temporarily(), Operations() as operations:
        states = torch.zeros(4000, 1, 8, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        weight = torch.zeros(50, 8, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        labels = torch.zeros(1, 4000, device="cuda", dtype=torch.long)
        scales = torch.ones(1, 4000, device="cuda")
        layer = SimpleNamespace(sequence_parallel=False, tp_group=group, weight=weight)
        losses = head.token_losses(states, labels, torch.arange(4000, device="cuda"), scales, 50, layer, weight)
        assert losses.dtype == torch.float32 and losses.shape == (1, 4000)
        # In two chunks: logits and the gradient of the states, and no product of 16 bits for that of the weight.
        assert (operations.calls["mm"], operations.calls["addmm"]) == (4, 2)
        norm = RMSNorm(8, device="cuda")
        out = norm(torch.zeros(3, 8, device="cuda", requires_grad=True))
        assert "FusedRmsNorm" in type(out.grad_fn).__name__


class Operations(TorchDispatchMode):
    """Counts the operations that are run while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[func.overloadpacket.__name__] += 1
        return func(*args, **kwargs or {})
