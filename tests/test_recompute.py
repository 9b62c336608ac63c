"""Activation recompute: the same gradients to the bit, and less memory kept."""

from typing import Any

import pytest
import torch

from tests import small


@pytest.fixture(scope="module")
def model() -> Any:
    return small.built(small.QWEN3)


def gradients(model: Any, batch: Any) -> dict[str, torch.Tensor]:
    model.zero_grad()
    small.step(model, batch)
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def test_gradients_are_the_same_to_the_bit(model: Any) -> None:
    batch = small.batch(model, 64)
    computed = {}
    for model.config.recompute_elementwise in (True, False):
        computed[model.config.recompute_elementwise] = gradients(model, batch)
    assert len(computed[True]) == 19
    for name, gradient in computed[True].items():
        assert torch.equal(gradient, computed[False][name]), name


@pytest.mark.parametrize("linear", ["self_attention.linear_qkv", "mlp.linear_fc1", "mlp.linear_fc2"])
def test_inputs_are_freed_until_they_are_needed(model: Any, linear: str) -> None:
    """The memory of a linear layer's input is free between its forward and its backward pass, and only then."""
    model.config.recompute_elementwise = True
    module = model.decoder.layers[1].get_submodule(linear)
    inputs: list[torch.Tensor] = []
    sizes: list[int] = []
    hooks = [
        module.register_forward_pre_hook(lambda module, args: inputs.append(args[0].data)),
        module.register_full_backward_hook(lambda *_: sizes.append(inputs[0].untyped_storage().nbytes())),
    ]
    loss = small.loss(model, small.batch(model, 64))
    sizes.append(inputs[0].untyped_storage().nbytes())
    loss.backward()
    for hook in hooks:
        hook.remove()
    assert sizes[0] == 0 < sizes[1] == inputs[0].numel() * inputs[0].element_size()


def test_a_frozen_layer_recomputes_nothing(model: Any) -> None:
    model.config.recompute_elementwise = True
    linear = model.decoder.layers[0].mlp.linear_fc2
    inputs: list[torch.Tensor] = []
    hook = linear.register_forward_pre_hook(lambda module, args: inputs.append(args[0].data))
    linear.weight.requires_grad_(False)
    small.step(model, small.batch(model, 64))
    linear.weight.requires_grad_(True)
    hook.remove()
    assert inputs[0].untyped_storage().nbytes() > 0
