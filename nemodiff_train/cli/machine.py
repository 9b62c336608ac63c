"""Report what a run would use on this machine, and what it would refuse, by the code that a run calls."""

from collections.abc import Iterator

import torch
from megatron.bridge.models.gpt_provider import GPTModelProvider
from megatron.core import optimizer
from megatron.core.extensions.transformer_engine import HAVE_TE

from nemodiff_train.attention.kernels import select_kernel
from nemodiff_train.config.config import TriModeConfig
from nemodiff_train.config.datasets import TextDatasetConfig
from nemodiff_train.config.defaults import adamw, base_config, schedule
from nemodiff_train.config.precision import precision_of
from nemodiff_train.model.provider import fit_to_host, tri_mode
from nemodiff_train.objective import ObjectiveConfig
from nemodiff_train.runtime import init_runtime
from nemodiff_train.runtime.versions import Row
from nemodiff_train.validation import kernels

REQUESTS: dict[str, dict[str, str]] = {
    "joint training": {},
    "model.attention_kernel=flash": {"attention_kernel": "flash"},
    "fp8": {"mixed_precision": "bf16_with_fp8_current_scaling_mixed"},
    "mxfp8": {"mixed_precision": "bf16_with_mxfp8_mixed"},
    "fp4": {"mixed_precision": "bf16_with_nvfp4_mixed"},
}
"""What a run may ask of the machine, and the settings that ask for it."""


def torch_and_cuda() -> Iterator[Row]:
    """Yield what torch was built with, and the GPUs that it finds."""
    nccl = ".".join(map(str, torch.cuda.nccl.version())) if torch.distributed.is_nccl_available() else "none"
    yield "torch", f"{torch.__version__}, CUDA {torch.version.cuda or 'none'}, NCCL {nccl}"
    if not init_runtime().cuda:
        yield "GPUs", "none that torch finds"
        return
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        memory = gpu.total_memory / 1e9
        yield f"GPU {index}", f"{gpu.name}, {memory:.0f} GB, compute capability {gpu.major}.{gpu.minor}"


def used() -> Iterator[Row]:
    """Yield the kernels and fusions of a run that asks for none, each with its reason."""
    host, config = init_runtime(), _example()
    device = torch.device("cuda" if host.cuda else "cpu")
    yield "device", f"{str(host).removeprefix('host: ')}; collectives of {host.backend}"
    yield "precision", f"{precision_of(config, host.cuda)}, for a model stored in bf16"
    local = "Megatron-Core's and this package's norms: no Transformer Engine"
    yield "layers", "Transformer Engine's" if HAVE_TE else local
    for name, causal in (("AR attention", True), ("joint attention", False)):
        kernel = select_kernel(device, causal)
        if kernel.name == "flex":
            yield name, f"FlexAttention in tiles of {kernel.tile[0]} queries x {kernel.tile[1]} keys"
        elif causal:
            yield name, "SDPA's causal kernel"
        else:
            yield name, "SDPA, tile by tile: FlexAttention has no backward on a CPU"
    yield "optimizer", f"{optimizer.Adam.__name__} of {optimizer.Adam.__module__.partition('.')[0]}"
    yield "C compiler", kernels.c_compiler() or "none, which Triton needs on a GPU"
    fit_to_host(config.model)
    for name, reason in (
        ("bias_activation_fusion", "plain torch; for SwiGLU without biases"),
        ("bias_dropout_fusion", "needs Transformer Engine"),
        ("persist_layer_norm", "needs Transformer Engine"),
        ("gradient_accumulation_fusion", "needs Apex's fused_weight_gradient_mlp_cuda"),
        ("cross_entropy_loss_fusion", "never: the head is this package's"),
        ("masked_softmax_fusion", "never: the attention is this package's"),
        ("apply_rope_fusion", "needs Transformer Engine; where all rows have the same positions"),
    ):
        yield name, f"{'on' if getattr(config.model, name) else 'off'} ({reason})"


def refused() -> Iterator[Row]:
    """Yield what this machine cannot do, by what asks for it."""
    for request, settings in REQUESTS.items():
        config = _example()
        for name, value in settings.items():
            setattr(config.model if hasattr(config.model, name) else config, name, value)
        yield request, "; ".join(kernels.problems(config)) or "possible"


def _example() -> TriModeConfig:
    """Return a small run of the joint stage with every setting at its default."""
    sizes = {"num_layers": 2, "hidden_size": 64, "num_attention_heads": 2}
    model = tri_mode(GPTModelProvider(**sizes, add_bias_linear=False, gated_linear_unit=True), {})
    model.activation_func, model.params_dtype = torch.nn.functional.silu, torch.bfloat16
    return base_config(
        model,
        ObjectiveConfig(),
        TextDatasetConfig(seq_length=4096),
        start_from=None,
        output="none",
        steps=1,
        batch_size=1,
        optimizer=adamw(),
        scheduler=schedule(0.0),
        precision=None,
    )
