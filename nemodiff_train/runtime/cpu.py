"""The CPU standing in for CUDA.

Megatron addresses CUDA throughout: ``device="cuda"``, streams, memory counters, CUDA random states,
NCCL groups.  On a machine without a GPU this module points every one of those calls at the CPU, so
that the same ``pretrain()`` runs there with real tensor, pipeline and data parallelism over gloo.
It makes training *correct* on a laptop or in a test, not fast, and is never active where CUDA works.
"""

import os
import types
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.overrides import TorchFunctionMode

CPU = torch.device("cpu")

# As many "devices" as ranks could be on one host: Megatron checks local_rank < device_count.
_DEVICES = 64


def _as_cpu(device: Any) -> Any:
    """``device`` with every spelling of a CUDA device replaced by the CPU."""
    if isinstance(device, int) and not isinstance(device, bool):
        return CPU
    if isinstance(device, str) and device.startswith("cuda"):
        return CPU
    if isinstance(device, torch.device) and device.type == "cuda":
        return CPU
    return device


class _CudaMeansCpu(TorchFunctionMode):
    """Rewrites the device argument of every torch call."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if kwargs and "device" in kwargs:
            kwargs = {**kwargs, "device": _as_cpu(kwargs["device"])}
        if func is torch.Tensor.to:
            args = (args[0], *(_as_cpu(argument) for argument in args[1:]))
        return func(*args, **kwargs) if kwargs else func(*args)


class _Inert:
    """A stream or an event that does nothing: the CPU runs everything in order."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __getattr__(self, name: str) -> Callable[..., None]:
        return _nothing

    def __enter__(self) -> "_Inert":
        return self

    def __exit__(self, *exception: object) -> None: ...

    def query(self) -> bool:
        return True

    def elapsed_time(self, other: object) -> float:
        return 0.0


def _nothing(*args: Any, **kwargs: Any) -> None: ...


def _zero(*args: Any, **kwargs: Any) -> int:
    return 0


def _inert(*args: Any, **kwargs: Any) -> _Inert:
    return _Inert()


def _replace_device_queries() -> None:
    cuda: Any = torch.cuda
    cuda.is_available = lambda: True
    cuda.device_count = lambda: _DEVICES
    cuda.current_device = lambda: CPU
    cuda.get_device_capability = lambda *args: (9, 0)
    cuda.get_device_name = lambda *args: "cpu"
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    properties = types.SimpleNamespace(
        name="cpu", total_memory=memory, multi_processor_count=os.cpu_count(), major=9, minor=0
    )
    cuda.get_device_properties = lambda *args: properties
    torch.accelerator.is_available = lambda *args, **kwargs: False


def _replace_streams_and_counters() -> None:
    cuda: Any = torch.cuda
    for name in ("set_device", "synchronize", "empty_cache", "set_stream", "reset_peak_memory_stats"):
        setattr(cuda, name, lambda *args, **kwargs: None)
    for name in ("memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved"):
        setattr(cuda, name, lambda *args, **kwargs: 0)
    cuda.utilization = lambda *args, **kwargs: 0
    cuda.memory_stats = lambda *args: {}
    cuda.Stream = cuda.Event = _Inert
    cuda.current_stream, cuda.default_stream, cuda.stream = (lambda *args, **kwargs: _Inert() for _ in range(3))
    cuda.is_current_stream_capturing = lambda: False
    cuda.nvtx = types.SimpleNamespace(range_push=_nothing, range_pop=_nothing, range=_inert)


def _replace_random_states() -> None:
    import megatron.core.tensor_parallel.random as tp_random

    def get_state(*args: Any, **kwargs: Any) -> torch.Tensor:
        return torch.get_rng_state()

    def set_state(state: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        torch.set_rng_state(state)

    cuda: Any = torch.cuda
    cuda.get_rng_state = cuda.random.get_rng_state = tp_random._get_cuda_rng_state = get_state
    cuda.set_rng_state = cuda.random.set_rng_state = tp_random._set_cuda_rng_state = set_state
    cuda.manual_seed = cuda.manual_seed_all = lambda seed: torch.default_generator.manual_seed(seed)
    cuda._lazy_call = lambda call, **kwargs: call()
    cuda.default_generators = (torch.default_generator,) * _DEVICES


def _replace_tensor_methods() -> None:
    cuda: Any = torch.cuda
    for kind in ("Float", "Double", "Int", "Long", "Byte"):
        setattr(cuda, f"{kind}Tensor", getattr(torch, f"{kind}Tensor"))
    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]
    torch.nn.Module.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]

    plain_type = torch.Tensor.type

    def type_as_on_cuda(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        # Megatron's gradient clipping asserts the type name 'torch.cuda.FloatTensor'.
        result = plain_type(self, *args, **kwargs)
        if isinstance(result, str) and "cuda" not in result:
            return result.replace("torch.", "torch.cuda.")
        return result

    torch.Tensor.type = type_as_on_cuda  # type: ignore[assignment, method-assign]
    torch.optim.Optimizer._accelerator_graph_capture_health_check = _nothing  # type: ignore[method-assign]


def _replace_barrier() -> None:
    plain_barrier: Any = dist.barrier

    def barrier(group: Any = None, async_op: bool = False, device_ids: Any = None) -> Any:
        return plain_barrier(group=group, async_op=async_op)  # gloo takes no device_ids

    setattr(dist, "barrier", barrier)  # noqa: B010  (a plain assignment would not type-check)


def _replace_asynchronous_saving() -> None:
    from megatron.core.dist_checkpointing.strategies.async_utils import PersistentAsyncCaller
    from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

    if PersistentAsyncCaller.async_loop is not save_worker:
        _PLAIN["async_loop"] = PersistentAsyncCaller.async_loop
        _PLAIN["preload_tensors"] = FileSystemWriterAsync.preload_tensors
    setattr(PersistentAsyncCaller, "async_loop", staticmethod(save_worker))  # noqa: B010
    setattr(FileSystemWriterAsync, "preload_tensors", staticmethod(copied_to_host))  # noqa: B010


_PLAIN: dict[str, Callable[..., Any]] = {}


def save_worker(*arguments: Any) -> None:
    """Megatron's process for asynchronous saves; a new one has no stand-ins yet."""
    from nemodiff_train.runtime.start import init_quietly

    init_quietly()
    _PLAIN["async_loop"](*arguments)


def copied_to_host(*arguments: Any, **named: Any) -> Any:
    """What Megatron brings from the GPU before training goes on; a tensor of the CPU it would not copy."""
    buckets = _PLAIN["preload_tensors"](*arguments, **named)
    return [
        (file, key, (content, [(item, tensor.clone()) for item, tensor in tensors]))
        for file, key, (content, tensors) in buckets
    ]


def cpu_as_cuda() -> None:
    """Point every CUDA call that Megatron makes at the CPU, for the rest of this process."""
    _replace_device_queries()
    _replace_streams_and_counters()
    _replace_random_states()
    _replace_tensor_methods()
    _replace_barrier()
    _replace_asynchronous_saving()
    _CudaMeansCpu().__enter__()
