"""Outputs of norms and of the gated activation that the backward pass makes again instead of keeping them.

They are a quarter of what a layer keeps, and cost a few elementwise operations to make from what is kept anyway.
Megatron's own way (``recompute_modules=layernorm``) compiles C++ at run time, takes Transformer Engine, and leaves
out the activation of a dense layer.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.fusions.fused_bias_swiglu import swiglu
from megatron.core.transformer.identity_op import IdentityOp
from torch import Tensor, nn


def recompute_activations(model: Any) -> None:
    """Let every layer of a Megatron GPT model drop the inputs of its linear layers that it can make again.

    It does so while ``config.recompute_elementwise`` holds.  Values and gradients stay the same to the bit.  What is
    left out: norms that Transformer Engine computes inside a linear layer, and feed-forwards other than SwiGLU.
    """
    for layer in model.decoder.layers:
        for norm, linear in (
            (layer.input_layernorm, layer.self_attention.linear_qkv),
            (layer.pre_mlp_layernorm, layer.mlp.linear_fc1),
        ):
            if not isinstance(norm, IdentityOp):
                _DroppedInput(model.config, norm, linear, norm.forward)
        if _is_swiglu(model.config):
            _DroppedInput(model.config, layer.mlp.linear_fc1, layer.mlp.linear_fc2, swiglu, from_output=True)


def _is_swiglu(config: Any) -> bool:
    """Whether Megatron's feed-forward is its :func:`swiglu`, and keeps that function's input alone."""
    return bool(config.gated_linear_unit and config.activation_func is F.silu and config.bias_activation_fusion)


class _DroppedInput:
    """The input of a linear layer, dropped behind it and made again when its gradients are due.

    Args:
        config: The model's; says whether to.
        source: The module before; its input, or its output, is kept for the backward pass anyway.
        linear: The linear layer.
        make: Its input as a function of what is kept.
        from_output: That it is a function of the source's output.
    """

    def __init__(
        self,
        config: Any,
        source: nn.Module,
        linear: nn.Module,
        make: Callable[[Tensor], Tensor],
        from_output: bool = False,
    ) -> None:
        self.config, self.make, self.from_output = config, make, from_output
        self.kept: Tensor | None = None
        source.register_forward_hook(self._remember)
        linear.register_forward_hook(self._drop)

    def _remember(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self.config.recompute_elementwise and torch.is_grad_enabled():
            kept: Tensor = output[0] if self.from_output else args[0]
            self.kept = kept.detach()

    def _drop(self, linear: Any, args: tuple[Any, ...], output: Any) -> None:
        kept, self.kept = self.kept, None
        result: Tensor = output[0]
        # Of a linear layer whose weight is frozen, autograd keeps no input.
        if kept is not None and result.requires_grad and linear.weight.requires_grad:
            _drop_until(result, args[0], partial(self.make, kept))


def _drop_until(result: Tensor, states: Tensor, make: Callable[[], Tensor]) -> None:
    """Free the memory of ``states`` until the gradient of ``result`` arrives.

    The memory is refilled in place, below autograd, which holds on to the tensor: ``.data`` is no change to it.
    """
    size = states.untyped_storage().nbytes()
    waiting = [(states.data, make)]

    def again(gradient: Tensor) -> None:
        if waiting:  # taken out: what the hook held would live until the end of the whole backward pass
            held, make_again = waiting.pop()
            held.untyped_storage().resize_(size)
            with torch.no_grad():
                held.copy_(make_again().view_as(held))

    result.register_hook(again)
    states.untyped_storage().resize_(0)
