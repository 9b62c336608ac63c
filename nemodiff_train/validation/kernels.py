"""Check what the machine can compute: attention kernels, number formats, overlapped communication."""

import importlib.util
import os
import shutil
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import torch
from megatron.bridge.training.mixed_precision import MIXED_PRECISION_RECIPES, get_mixed_precision_config
from megatron.core.extensions.transformer_engine import HAVE_TE

from nemodiff_train.attention.kernels import KERNELS
from nemodiff_train.config.config import TriModeConfig
from nemodiff_train.config.precision import precision_of
from nemodiff_train.errors import nearest
from nemodiff_train.model.provider import TriModeModelProvider
from nemodiff_train.runtime import init_runtime

_FLASH, _REMEDY = "model.attention_kernel=flash", "set model.attention_kernel=auto"


def problems(config: TriModeConfig) -> Iterator[str]:
    """Yield what this machine cannot compute as asked, one line each."""
    cuda, views = init_runtime().cuda, config.objective.noisy_views
    yield from attention_problems(config.model, config.dataset.seq_length * (views + 1), cuda)
    if cuda and config.model.attention_kernel == "auto":
        yield from _step_problems(config)
    yield from _precision_problems(config, cuda)
    yield from _overlap_problems(config)
    if cuda and views:
        yield from _compiler_problems()


def attention_problems(model: TriModeModelProvider, positions: int, cuda: bool) -> Iterator[str]:
    """Yield what keeps a model's attention settings from being used, one line each.

    Args:
        model: The model.
        positions: Positions per training sample.
        cuda: Whether there is a GPU.
    """
    kernel, tile = model.attention_kernel, model.attention_tile
    if kernel not in KERNELS:
        known = "' or '".join(KERNELS)
        yield f"model.attention_kernel is '{kernel}'; use '{known}'.{nearest(str(kernel), KERNELS)}"
    if tile < 0 or tile % 16:
        yield f"model.attention_tile is {tile}; use a multiple of 16, or 0 for the kernel's own"
    if kernel == "flash":
        yield from _flash_problems(model, positions, cuda)


def _step_problems(config: TriModeConfig) -> Iterator[str]:
    """Yield a line where tiles are shorter than FlexAttention's own steps, known for Hopper and Blackwell."""
    model = config.model
    if not model.attention_tile % 128 or any("BLOCK" in name for name in model.attention_options):
        return
    wide = precision_of(config, cuda=True) == "fp32" or not 64 <= (model.kv_channels or 0) <= 128
    if not wide and torch.cuda.get_device_capability()[0] in (9, 10):
        yield (
            f"model.attention_tile is {model.attention_tile}, and FlexAttention's steps are up to 128 long on this "
            "GPU; use a multiple of 128, or name shorter steps in model.attention_options"
        )


def c_compiler() -> str | None:
    """Return the C compiler that Triton would take."""
    return os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")


def _compiler_problems() -> Iterator[str]:
    """Yield a line where FlexAttention's kernels cannot be built: Triton compiles their launcher in C."""
    if not c_compiler():
        yield "there is no C compiler, which Triton needs for FlexAttention; install gcc, or name one in CC"
    scheme = sysconfig.get_default_scheme()
    header = Path(sysconfig.get_path("include", "posix_prefix" if scheme == "posix_local" else scheme), "Python.h")
    if not header.is_file():
        yield f"there is no '{header}', which Triton compiles that launcher with; install python3-dev (python3-devel)"


def _flash_problems(model: TriModeModelProvider, positions: int, cuda: bool) -> Iterator[str]:
    # On older GPUs its kernels have been reported to ignore the mask and compute all pairs.
    if not cuda or torch.cuda.get_device_capability()[0] not in (9, 10):
        yield f"{_FLASH} needs a GPU of the Hopper or data-center Blackwell kind; {_REMEDY}"
    if not _has_flash():
        yield f"{_FLASH} needs the package flash-attn-4; install it, or {_REMEDY}"
    # It is not documented what its kernels do with captured tensors after the last whole tile.
    side = model.attention_tile or 256
    if model.context_parallel_size > 1 or positions % side:
        yield f"{_FLASH} takes samples of whole tiles of {side} positions, on one context-parallel rank; {_REMEDY}"


def _has_flash() -> bool:
    try:
        return importlib.util.find_spec("flash_attn.cute") is not None
    except ModuleNotFoundError:
        return False


def _precision_problems(config: TriModeConfig, cuda: bool) -> Iterator[str]:
    precision = config.mixed_precision
    known = [name for name in MIXED_PRECISION_RECIPES if "-" not in name]
    if precision is None:
        return
    if isinstance(precision, str) and precision.replace("-", "_") not in known:
        yield f"precision '{precision}' is unknown; use one of {', '.join(known)}.{nearest(precision, known)}"
        return
    formats = get_mixed_precision_config(precision)
    if not (formats.fp8 or formats.fp4):
        return
    if config.evaluation.interval:
        yield "decoding in the loop takes single tokens, which FP8 and FP4 exclude; set evaluation.interval=0"
    capability = (10, 0) if formats.fp4 or formats.fp8_recipe == "mxfp8" else (8, 9)
    if not (HAVE_TE and cuda and torch.cuda.get_device_capability() >= capability):
        yield (
            f"{'fp4' if formats.fp4 else 'fp8'} needs Transformer Engine and a GPU of compute capability "
            f"{capability[0]}.{capability[1]} or more; use bf16_mixed"
        )


def _overlap_problems(config: TriModeConfig) -> Iterator[str]:
    model, ddp, optimizer = config.model, config.ddp, config.optimizer
    sharded = ddp.use_distributed_optimizer or optimizer.use_distributed_optimizer
    if (ddp.overlap_param_gather or optimizer.overlap_param_gather) and not sharded:
        yield "ddp.overlap_param_gather=true takes optimizer.use_distributed_optimizer=true as well"
    section = "comm_overlap" if config.comm_overlap and config.comm_overlap.tp_comm_overlap else "model"
    if section == "model" and not model.tp_comm_overlap:
        return
    if not HAVE_TE:
        yield f"{section}.tp_comm_overlap=true needs Transformer Engine, which is not installed; leave it out"
    if model.tensor_model_parallel_size == 1 or not model.sequence_parallel:
        yield f"{section}.tp_comm_overlap=true needs tensor and sequence parallelism; leave it out"
    if config.evaluation.interval:
        yield f"{section}.tp_comm_overlap=true excludes decoding in the loop; set evaluation.interval=0"
