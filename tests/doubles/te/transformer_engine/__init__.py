"""Behave as Transformer Engine does towards Megatron, in plain torch and on a CPU.

With this folder on the path Megatron-Core and Bridge take every branch that they take where Transformer Engine is
installed, and their own wrappers (``TELinear``, ``TELayerNormColumnParallelLinear``) wrap the layers below. What
matters of the real ones is kept, as Core's and Bridge's calls and comments show it:

* every module has an extra state, empty without delayed scaling;
* a linear layer with a norm returns the norm's output as well once ``return_layernorm_output`` is set;
* with ``fuse_wgrad_accumulation`` the gradient of a weight is added to ``weight.main_grad``, which has to be there;
* the kernel for rotary angles takes those of one row alone, in fp32;
* under ``fp8_autocast`` a product takes a multiple of 8 rows and of 16 columns, and is one of rounded factors.

Names that only other models ask for are absent, as they are in other versions.
"""

import contextlib
import enum
import pickle
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from fused import FusedAdam, apply, norm, scale
from torch import Tensor, nn

__version__ = "2.12.0"


class Format(enum.Enum):
    """Formats of FP8."""

    E4M3 = "e4m3"
    HYBRID = "hybrid"


class _Recipe:
    """How factors are scaled."""

    def __init__(self, **settings: Any) -> None:
        vars(self).update(settings)


class DelayedScaling(_Recipe):
    """By the largest values of earlier steps, which are a state."""


class Float8CurrentScaling(_Recipe):
    """By the largest value of each tensor."""


class Float8BlockScaling(_Recipe):
    """By the largest value of each block."""


class MXFP8BlockScaling(_Recipe):
    """By the largest value of each 32 elements."""


class FP8GlobalStateManager:
    """What ``fp8_autocast`` sets."""

    recipe: Any = None
    """The recipe in use; None outside."""

    @classmethod
    def is_fp8_enabled(cls) -> bool:
        """Return whether products are in FP8."""
        return cls.recipe is not None


@contextlib.contextmanager
def _within(recipe: Any) -> Iterator[None]:
    before, FP8GlobalStateManager.recipe = FP8GlobalStateManager.recipe, recipe
    try:
        yield
    finally:
        FP8GlobalStateManager.recipe = before


def fp8_autocast(enabled: bool = True, fp8_recipe: Any = None, fp8_group: Any = None) -> Any:
    """Compute products in FP8 while the context is entered."""
    return _within(fp8_recipe if enabled else None)


@contextlib.contextmanager
def fp8_model_init(enabled: bool = True, recipe: Any = None) -> Iterator[None]:
    """Make weights that are quantized already; here they stay as they are."""
    yield


def checkpoint(function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """Compute a function again in the backward pass, in the precision of its forward pass."""
    recipe = FP8GlobalStateManager.recipe

    def contexts() -> tuple[Any, Any]:
        return contextlib.nullcontext(), _within(recipe)

    return torch.utils.checkpoint.checkpoint(function, *arguments, use_reentrant=False, context_fn=contexts)


def _rounded(values: Tensor) -> Tensor:
    scale = values.detach().abs().amax().clamp(min=1e-12) / 448
    return (values / scale).to(torch.float8_e4m3fn).to(values.dtype) * scale


class _Product(torch.autograd.Function):
    """A product with a weight, whose gradient may go straight to its buffer."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, fuse: bool) -> Tensor:
        ctx.weight, ctx.fuse = weight, fuse
        factors = x, weight
        if FP8GlobalStateManager.is_fp8_enabled():
            rows = x.numel() // x.shape[-1]
            if rows % 8 or x.shape[-1] % 16 or len(weight) % 16:
                raise AssertionError(f"FP8 takes multiples of 8 x 16, not {rows} x {x.shape[-1]} by {len(weight)}")
            factors = _rounded(x), _rounded(weight)
        ctx.save_for_backward(*factors)
        return factors[0] @ factors[1].T

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        d_weight = None
        if ctx.needs_input_grad[1]:
            d_weight = gradient.flatten(0, -2).T @ x.flatten(0, -2)
            if ctx.fuse:
                ctx.weight.main_grad += d_weight
                ctx.weight.grad_added_to_main_grad = True
                d_weight = torch.zeros_like(d_weight)
        return gradient @ weight, d_weight, None


class TransformerEngineBaseModule(nn.Module):
    """A module with an extra state."""

    def get_extra_state(self) -> Tensor:
        """Return the state of delayed scaling, or nothing."""
        if not isinstance(self.__dict__.get("recipe"), DelayedScaling):
            return torch.empty(0, dtype=torch.uint8)
        return torch.frombuffer(bytearray(pickle.dumps({"steps": self.steps})), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor | None) -> None:
        """Take back what :meth:`get_extra_state` has returned."""
        if state is not None and state.numel():
            self.steps = pickle.loads(state.numpy().tobytes())["steps"]


def _normed(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    from nemodiff_train.model.norm import _RMSNorm

    return _RMSNorm.apply(x, weight, eps)  # keeps its input alone, as the real one does


class RMSNorm(TransformerEngineBaseModule):
    """The norm alone."""

    def __init__(
        self, normalized_shape: int, eps: float, sequence_parallel: bool, zero_centered_gamma: bool,
        params_dtype: torch.dtype, device: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        self.weight = nn.Parameter(torch.ones(normalized_shape, dtype=params_dtype, device=device))
        self.weight.sequence_parallel = sequence_parallel  # type: ignore[attr-defined]
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise [..., hidden]."""
        return _normed(x, self.weight, self.eps)


class LayerNorm(RMSNorm):
    """Of models that are not tested here."""


class Linear(TransformerEngineBaseModule):
    """A linear layer whose weight may be divided over tensor-parallel ranks."""

    def __init__(
        self, in_features: int, out_features: int, *, sequence_parallel: bool, fuse_wgrad_accumulation: bool,
        tp_group: Any, tp_size: int, get_rng_state_tracker: Any, init_method: Callable[[Tensor], Any], bias: bool,
        return_bias: bool, parallel_mode: str | None, params_dtype: torch.dtype, device: Any, **unused: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes

        self.in_features = in_features // (tp_size if parallel_mode == "row" else 1)
        self.out_features = out_features // (tp_size if parallel_mode == "column" else 1)
        self.parallel_mode, self.tp_group, self.tp_size = parallel_mode, tp_group, tp_size
        self.sequence_parallel = sequence_parallel and tp_size > 1
        self.fuse_wgrad_accumulation, self.return_bias, self.use_bias = fuse_wgrad_accumulation, return_bias, bias
        self.steps, self.recipe = 0, None
        self.weight = nn.Parameter(
            torch.empty(self.out_features, self.in_features, dtype=params_dtype, device=device)
        )
        tracked = get_rng_state_tracker().fork() if get_rng_state_tracker else contextlib.nullcontext()
        with tracked:
            init_method(self.weight)
        set_tensor_model_parallel_attributes(self.weight, True, int(parallel_mode == "row"), 1)
        self.bias = nn.Parameter(torch.zeros(self.out_features, dtype=params_dtype, device=device)) if bias else None
        if self.bias is not None:
            set_tensor_model_parallel_attributes(self.bias, parallel_mode == "column", 0, 1)

    def forward(self, x: Tensor, is_first_microbatch: bool | None = None) -> Any:
        """Multiply [positions, batch, in] by the weight."""
        out = self._multiplied(self._gathered(x))
        return (out, self.bias) if self.return_bias else out

    def _gathered(self, x: Tensor) -> Tensor:
        from megatron.core.tensor_parallel import mappings

        if self.parallel_mode != "column" or self.tp_size == 1:
            return x
        if self.sequence_parallel:
            return mappings.gather_from_sequence_parallel_region(x, group=self.tp_group)
        return mappings.copy_to_tensor_model_parallel_region(x, group=self.tp_group)

    def _multiplied(self, x: Tensor) -> Tensor:
        from megatron.core.tensor_parallel import mappings

        self.recipe = FP8GlobalStateManager.recipe
        self.steps += self.training and self.recipe is not None
        out = _Product.apply(x, self.weight, self.fuse_wgrad_accumulation)
        if self.parallel_mode == "row" and self.tp_size > 1:
            reduce = "reduce_scatter_to_sequence_parallel_region" if self.sequence_parallel else (
                "reduce_from_tensor_model_parallel_region"
            )  # fmt: skip
            out = getattr(mappings, reduce)(out, group=self.tp_group)
        return out if self.bias is None or self.return_bias else out + self.bias


class LayerNormLinear(Linear):
    """A norm and a linear layer."""

    def __init__(
        self, in_features: int, out_features: int, *, eps: float, normalization: str, return_layernorm_output: bool,
        zero_centered_gamma: bool, **options: Any,
    ) -> None:  # fmt: skip
        super().__init__(in_features, out_features, **options)
        assert normalization == "RMSNorm" and not zero_centered_gamma
        kind = {"dtype": options["params_dtype"], "device": options["device"]}
        self.layer_norm_weight = nn.Parameter(torch.ones(in_features, **kind))
        self.layer_norm_weight.sequence_parallel = self.sequence_parallel  # type: ignore[attr-defined]
        self.eps, self.return_layernorm_output = eps, return_layernorm_output
        self.return_layernorm_output_gathered = False

    def forward(self, x: Tensor, is_first_microbatch: bool | None = None) -> Any:
        """Normalise [positions, batch, in] and multiply by the weight."""
        normed = _normed(x, self.layer_norm_weight, self.eps)
        gathered = self._gathered(normed)
        out = self._multiplied(gathered)
        returned = [out, self.bias] if self.return_bias else [out]
        if self.return_layernorm_output:
            returned.append(gathered if self.return_layernorm_output_gathered else normed)
        return tuple(returned) if len(returned) > 1 else out


def apply_rotary_pos_emb(
    t: Tensor, freqs: Tensor, tensor_format: str, interleaved: bool = False, fused: bool = False
) -> Tensor:
    """Rotate queries or keys [positions, batch, heads, head size] by angles [positions, 1, 1, rotated]."""
    assert fused and tensor_format == "sbhd" and not interleaved
    assert freqs.shape == (len(t), 1, 1, freqs.shape[-1]) and freqs.dtype == torch.float32, freqs.shape
    sizes.append(tuple(t.shape))
    rotated, rest = t[..., : freqs.shape[-1]].float(), t[..., freqs.shape[-1] :]
    low, high = rotated.chunk(2, dim=-1)
    turned = rotated * freqs.cos() + torch.cat([-high, low], dim=-1) * freqs.sin()
    return torch.cat([turned.to(t.dtype), rest], dim=-1)


sizes: list[tuple[int, ...]] = []
"""Shapes that the kernel for rotary angles has been called with."""


class _Generators:
    """Random states by name."""

    def reset(self) -> None: ...
    def set_states(self, states: Any) -> None: ...
    def add(self, name: str, seed: int) -> None: ...


class _Unused(types.ModuleType):
    """A module whose names are only in annotations and base classes."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (nn.Module,), {})


def _module(name: str, kind: type[types.ModuleType] = types.ModuleType, **names: Any) -> types.ModuleType:
    module = kind(f"{__name__}.{name}")
    vars(module).update(names, __path__=[])
    sys.modules[module.__name__] = module
    parent, _, last = module.__name__.rpartition(".")
    setattr(sys.modules[parent], last, module)
    return module


def _nothing(name: str) -> type:
    return type(name, (nn.Module,), {})


class QuantizedTensor(Tensor):
    """A weight in FP8."""


_module("common")
_module(
    "common.recipe", Format=Format, DelayedScaling=DelayedScaling, Float8CurrentScaling=Float8CurrentScaling,
    Float8BlockScaling=Float8BlockScaling, MXFP8BlockScaling=MXFP8BlockScaling, NVFP4BlockScaling=_Recipe,
)  # fmt: skip
_fp8 = {"fp8_autocast": fp8_autocast, "fp8_model_init": fp8_model_init}
_module(
    "pytorch", Linear=Linear, LayerNormLinear=LayerNormLinear, RMSNorm=RMSNorm, LayerNorm=LayerNorm, **_fp8,
    **{name: _nothing(name) for name in ("DotProductAttention", "GroupedLinear", "TransformerLayer")},
)  # fmt: skip
_module("pytorch.fp8", FP8GlobalStateManager=FP8GlobalStateManager, **_fp8)
_module("pytorch.ops", _Unused)
_module("pytorch.attention")
_module("pytorch.attention.rope", apply_rotary_pos_emb=apply_rotary_pos_emb)
_module("pytorch.module")
_module(
    "pytorch.module.base", TransformerEngineBaseModule=TransformerEngineBaseModule,
    get_dummy_wgrad=lambda shape, dtype, zero=False: torch.zeros(shape, dtype=dtype),
)  # fmt: skip
_module(
    "pytorch.distributed", CudaRNGStatesTracker=_Generators, checkpoint=checkpoint,
    activation_recompute_forward=lambda **unused: contextlib.nullcontext(),
)  # fmt: skip
_module(
    "pytorch.optimizers", FusedAdam=FusedAdam, FusedSGD=torch.optim.SGD, multi_tensor_applier=apply,
    multi_tensor_l2norm=norm, multi_tensor_scale=scale, multi_tensor_scale_tensor=scale,
)  # fmt: skip
_module("pytorch.tensor", QuantizedTensor=QuantizedTensor)
_module("pytorch.float8_tensor", Float8Tensor=QuantizedTensor)
_router = ("fused_compute_score_for_moe_aux_loss", "fused_moe_aux_loss", "fused_topk_with_score_function")
_module("pytorch.router", **dict.fromkeys(_router))
