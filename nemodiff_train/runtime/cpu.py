"""The CPU backend: the CPU in the place of CUDA.

Megatron addresses CUDA throughout: ``device="cuda"``, streams, memory counters, CUDA random states,
NCCL groups.  On a machine without a GPU this module points every one of those calls at the CPU, so
that the same ``pretrain()`` runs there with real tensor, pipeline and data parallelism over gloo.
It makes training *correct* on a laptop or in a test, not fast, and is never active where CUDA works.

All of what it replaces is needed for as long as there is a CPU backend.
"""

import os
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch.overrides import TorchFunctionMode

from nemodiff_train.runtime.replace import replace

CPU = torch.device("cpu")

_DEVICES = 64
"""As many as ranks could be on one host: Megatron checks that the local rank is below ``device_count``."""


def _as_cpu(device: Any) -> Any:
    """Return ``device`` with every spelling of a CUDA device replaced by the CPU."""
    is_index = isinstance(device, int) and not isinstance(device, bool)
    is_name = isinstance(device, str) and device.startswith("cuda")
    is_device = isinstance(device, torch.device) and device.type == "cuda"
    return CPU if is_index or is_name or is_device else device


class _CudaMeansCpu(TorchFunctionMode):
    """Rewrites the device argument of every torch call."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if kwargs and "device" in kwargs:
            kwargs = {**kwargs, "device": _as_cpu(kwargs["device"])}
        if func is torch.Tensor.to:
            args = (args[0], *(_as_cpu(argument) for argument in args[1:]))
        return func(*args, **kwargs) if kwargs else func(*args)


class _Inert:
    """A stream, an event or a range of NVTX that does nothing: the CPU runs everything in order."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __getattr__(self, name: str) -> Callable[..., "_Inert"]:
        return _returning(self)

    def __enter__(self) -> "_Inert":
        return self

    def __exit__(self, *exception: object) -> None: ...

    def query(self) -> bool:
        return True

    def elapsed_time(self, other: object) -> float:
        return 0.0


def _returning(value: Any) -> Callable[..., Any]:
    """Return a new function of any arguments; torch's compiler wants one for each name."""
    return lambda *args, **kwargs: value


def disable_torch_compile() -> None:
    """Let ``torch.compile`` return its argument: compiled code would bypass the rewriting of devices."""
    os.environ["TORCHDYNAMO_DISABLE"] = "1"

    def compile_(model: Any = None, **options: Any) -> Any:
        return model if model is not None else lambda function: function

    replace(torch, "compile", compile_, takes="model, ...")


def get_random_state(*args: Any, **kwargs: Any) -> torch.Tensor:
    """Return the CPU's random state, for whatever device."""
    return torch.get_rng_state()


def set_random_state(new_state: torch.Tensor, *args: Any, **kwargs: Any) -> None:
    """Set the CPU's random state, for whatever device."""
    torch.set_rng_state(new_state)


def redirect_cuda_to_cpu() -> None:
    """Point every CUDA call of torch at the CPU, for the rest of this process."""
    _replace_cuda_module()
    _replace_methods()
    _CudaMeansCpu().__enter__()


def _replace_cuda_module() -> None:
    # The device.
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    properties = SimpleNamespace(
        name="cpu", total_memory=memory, multi_processor_count=os.cpu_count(), major=9, minor=0
    )
    replace(torch.cuda, "is_available", _returning(True), takes="")
    replace(torch.cuda, "device_count", _returning(_DEVICES), takes="")
    replace(torch.cuda, "current_device", _returning(CPU), takes="")
    replace(torch.cuda, "get_device_capability", _returning((9, 0)), takes="device")
    replace(torch.cuda, "get_device_name", _returning("cpu"), takes="device")
    replace(torch.cuda, "get_device_properties", _returning(properties), takes="device")
    replace(torch.accelerator, "is_available", _returning(False), takes="")

    # Streams, events and counters.
    for name in ("set_device", "synchronize", "reset_peak_memory_stats"):
        replace(torch.cuda, name, _returning(None), takes="device")
    for name in ("memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved", "utilization"):
        replace(torch.cuda, name, _returning(0), takes="device")
    for name in ("current_stream", "default_stream"):
        replace(torch.cuda, name, _returning(_Inert()), takes="device")
    replace(torch.cuda, "stream", _returning(_Inert()), takes="stream")
    replace(torch.cuda, "set_stream", _returning(None), takes="stream")
    replace(torch.cuda, "empty_cache", _returning(None), takes="")
    replace(torch.cuda, "memory_stats", lambda *args: {}, takes="device")
    replace(torch.cuda, "Stream", _Inert, takes=None)
    replace(torch.cuda, "Event", _Inert, takes=None)
    replace(torch.cuda, "nvtx", _Inert(), takes=None)
    replace(torch.cuda, "is_current_stream_capturing", _returning(False), takes="")

    # Random states.
    for owner in (torch.cuda, torch.cuda.random):
        replace(owner, "get_rng_state", get_random_state, takes="device")
        replace(owner, "set_rng_state", set_random_state, takes="new_state, device")
    for name in ("manual_seed", "manual_seed_all"):
        replace(torch.cuda, name, lambda seed: torch.default_generator.manual_seed(seed), takes="seed")
    replace(torch.cuda, "_lazy_call", lambda call, **kwargs: call(), takes="callable, kwargs")
    replace(torch.cuda, "default_generators", (torch.default_generator,) * _DEVICES, takes=None)


def _replace_methods() -> None:
    for kind in ("Float", "Double", "Int", "Long", "Byte"):
        replace(torch.cuda, f"{kind}Tensor", getattr(torch, f"{kind}Tensor"), takes=None)
    replace(torch.Tensor, "cuda", lambda self, *args, **kwargs: self, takes=None)
    replace(torch.nn.Module, "cuda", lambda self, *args, **kwargs: self, takes="self, device")
    replace(torch.optim.Optimizer, "_accelerator_graph_capture_health_check", _returning(None), takes="self")

    def type_as_on_cuda(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        # Megatron's gradient clipping asserts the type name 'torch.cuda.FloatTensor'.
        result = original_type(self, *args, **kwargs)
        if isinstance(result, str) and "cuda" not in result:
            return result.replace("torch.", "torch.cuda.")
        return result

    def barrier(group: Any = None, async_op: bool = False, device_ids: Any = None) -> Any:
        return original_barrier(group=group, async_op=async_op)  # gloo takes no device_ids

    original_type = replace(torch.Tensor, "type", type_as_on_cuda, takes=None)
    original_barrier = replace(dist, "barrier", barrier, takes="group, async_op, device_ids, ...")
