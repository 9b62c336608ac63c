"""Activation recompute for the outputs of norms and of the gated activation.

They are a quarter of what a layer keeps, and cost a few elementwise operations to compute again from what is kept
anyway. Megatron's own way (``recompute_modules=layernorm``) compiles C++ at run time, needs Transformer Engine, and
leaves out the activation of a dense layer.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from megatron.core.fusions.fused_bias_swiglu import swiglu
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.identity_op import IdentityOp
from torch import Tensor, nn


def recompute_activations(model: GPTModel) -> None:
    """Let every layer of a model free the inputs of its linear layers that it can compute again.

    It does so while ``config.recompute_elementwise`` holds, unless Megatron recomputes whole layers. Values and
    gradients stay the same to the bit. Norms that Transformer Engine computes inside a linear layer, and
    feed-forwards other than SwiGLU, are left out.
    """
    config = model.config
    # Megatron's swiglu keeps only its input for the backward pass.
    is_swiglu = config.gated_linear_unit and config.activation_func is F.silu and config.bias_activation_fusion
    for layer in model.decoder.layers:
        for norm, linear in (
            (layer.input_layernorm, layer.self_attention.linear_qkv),
            (layer.pre_mlp_layernorm, layer.mlp.linear_fc1),
        ):
            if not isinstance(norm, IdentityOp):
                _RecomputedInput(config, norm, linear, norm.forward)
        if is_swiglu:
            _RecomputedInput(config, layer.mlp.linear_fc1, layer.mlp.linear_fc2, swiglu, from_output=True)


class _RecomputedInput:
    """The input of a linear layer, freed after its forward and recomputed when its gradients are due.

    Args:
        config: The model's; ``recompute_elementwise`` says whether to.
        source: The module before the linear layer. Its input, or its output, is kept for the backward pass anyway.
        linear: The linear layer.
        recompute: Computes the linear layer's input from what is kept.
        from_output: Whether that is the source's output.
    """

    def __init__(
        self,
        config: TransformerConfig,
        source: nn.Module,
        linear: nn.Module,
        recompute: Callable[[Tensor], Tensor],
        from_output: bool = False,
    ) -> None:
        self.config, self.recompute, self.from_output = config, recompute, from_output
        self.kept: Tensor | None = None
        source.register_forward_hook(self._after_source)
        linear.register_forward_hook(self._after_linear)

    def _after_source(
        self, source: nn.Module, inputs: tuple[Tensor, ...], output: Tensor | tuple[Tensor, ...]
    ) -> None:
        """Keep the tensor that the input of the linear layer is computed from."""
        whole_layers = self.config.recompute_granularity == "full" and self.config.recompute_method == "uniform"
        if self.config.recompute_elementwise and not whole_layers and torch.is_grad_enabled():
            kept = output[0] if self.from_output else inputs[0]
            # Under LoRA, Transformer Engine's layer returns the output of its norm as well.
            self.kept = (kept[0] if isinstance(kept, tuple) else kept).detach()

    def _after_linear(
        self, linear: ColumnParallelLinear, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]
    ) -> None:
        """Free the input of the linear layer, where autograd keeps it: not where the weight is frozen."""
        kept, self.kept = self.kept, None
        if kept is not None and output[0].requires_grad and linear.weight.requires_grad:
            _free_until_backward(output[0], inputs[0], partial(self.recompute, kept))


def _free_until_backward(output: Tensor, states: Tensor, recompute: Callable[[], Tensor]) -> None:
    """Free the memory of ``states`` until the gradient of ``output`` arrives.

    The memory is refilled in place, without autograd's knowledge, which holds on to the tensor: writing to ``.data``
    does not count as a change to it.
    """
    size = states.untyped_storage().nbytes()
    pending = [(states.data, recompute)]

    def refill(gradient: Tensor) -> None:
        if pending:  # taken out: what the hook held would live until the end of the whole backward pass
            freed, recompute = pending.pop()
            freed.untyped_storage().resize_(size)
            with torch.no_grad():
                freed.copy_(recompute().view_as(freed))

    output.register_hook(refill)
    states.untyped_storage().resize_(0)
