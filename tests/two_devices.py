"""Tell tensors of the host from tensors of the device, on a machine that has only a host.

On a GPU an operation over tensors of both is an error, and reading a value of the device waits until it has computed
everything before. Here both would pass unnoticed, so :class:`TwoDevices` marks every tensor with the side it would be
on: the device's are the model's, what is made with ``device=`` of such a tensor or ``.cuda()``, and what is computed
from them.
"""

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

GPU = torch.device("cuda", 0)
_MADE = frozenset(
    ("zeros", "ones", "empty", "full", "tensor", "as_tensor", "arange", "eye", "rand", "randn", "randint", "linspace",
     "randperm", "from_numpy")
)  # fmt: skip
"""Functions whose result is on the host, unless they name a device."""
_READ = frozenset(("item", "tolist", "__bool__", "__int__", "__float__", "__index__", "nonzero", "cpu", "unique"))
"""Functions that wait for the device: they bring values to the host, or their result's size depends on values."""
_COPIES = frozenset(("copy_", "to", "cpu", "cuda", "type_as"))
_COLLECTIVES = frozenset(
    ("all_reduce", "broadcast", "all_gather_into_tensor", "reduce_scatter_tensor", "send", "recv")
)


class Mixed(AssertionError):
    """An operation over tensors of both sides."""


class TwoDevices(TorchFunctionMode):
    """Raises where CUDA would refuse, and counts waits."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[str] = Counter()
        """Number of waits by the line of the package that waits."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name, owner = getattr(func, "__name__", ""), getattr(func, "__self__", None)
        if name == "__get__" and getattr(owner, "__name__", "") in ("device", "is_cuda"):
            return self._told(owner.__name__, args, func(*args, **kwargs))
        if name == "__set__":
            return func(*args, **kwargs)
        tensors = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
        if any(map(torch._C._functorch.is_functorch_wrapped_tensor, tensors)):  # inside torch's own vmap
            return func(*args, **kwargs)
        self._check(name, args, tensors)
        result = func(*args, **kwargs)
        on_gpu = _is_on_gpu(name, args, kwargs, tensors)
        if name in _COPIES and result is args[0] and on_gpu != is_marked(result):
            result = result.clone()  # moved to where it is already
        for each in tree_leaves(result):
            if isinstance(each, Tensor) and (name in _MADE or any(hasattr(tensor, "on_gpu") for tensor in tensors)):
                mark(each, on_gpu)
        return result

    def _told(self, name: str, args: Any, found: Any) -> Any:
        if not is_marked(args[0]):
            return found
        return GPU if name == "device" else found  # the kernels of CUDA cannot be run

    def _check(self, name: str, args: Any, tensors: list[Tensor]) -> None:
        # A number of the host goes along; what torch's vmap has made is on no known side.
        known = [tensor for tensor in tensors if tensor.dim() and hasattr(tensor, "on_gpu")]
        if len(set(map(is_marked, known))) == 2 and not _may_mix(name, args):
            shapes = ", ".join(f"{'device' if is_marked(tensor) else 'host'}{list(tensor.shape)}" for tensor in known)
            raise Mixed(f"{place()}: {name} of {shapes}")
        if name in _READ and tensors and is_marked(tensors[0]):
            self.waits[place()] += 1
        if name in ("numpy", "__array__") and tensors and is_marked(tensors[0]):
            raise Mixed(f"{place()}: {name} of a tensor on the device")
        if name in _COLLECTIVES and tensors and not is_marked(tensors[0]):
            raise Mixed(f"{place()}: {name} of a tensor on the host, which NCCL refuses")
        if name == "__getitem__" and is_marked(args[0]) and _masks(args[1]):
            self.waits[place()] += 1  # its size depends on values


def is_marked(tensor: Tensor) -> bool:
    """Return whether a tensor would be on the device."""
    return bool(getattr(tensor, "on_gpu", False))


def mark(tensor: Tensor, on_gpu: bool = True) -> None:
    """Say on which side a tensor would be."""
    tensor.on_gpu = on_gpu  # type: ignore[attr-defined]


def mark_model(model: torch.nn.Module) -> None:
    """Put a model on the device, with the tensors that its modules keep beside parameters."""
    for module in model.modules():
        kept = [value for value in vars(module).values() if isinstance(value, Tensor)]
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False), *kept):
            mark(tensor)


def place() -> str:
    """Return the innermost line of the package that is being run."""
    frame = sys._getframe(1)
    while frame.f_back is not None and "/nemodiff_train/" not in frame.f_code.co_filename:
        frame = frame.f_back
    return f"{frame.f_code.co_filename.rpartition('/nemodiff_train/')[2]}:{frame.f_lineno}"


def _is_on_gpu(name: str, args: Any, kwargs: Any, tensors: list[Tensor]) -> bool:
    """Return on which side the result of a function is."""
    if name in ("cpu", "cuda"):
        return name == "cuda"
    named = [kwargs["device"]] if kwargs.get("device") is not None else []
    if name == "to":
        named += [each for each in args[1:] if isinstance(each, str | torch.device)]
        named += [GPU if is_marked(each) else "cpu" for each in args[1:] if isinstance(each, Tensor)]
    if named:
        return "cuda" in str(named[0])
    if name in _MADE:
        return False
    if name in _COPIES or name in ("__getitem__", "__setitem__"):
        return is_marked(args[0])
    return any(map(is_marked, tensors))


def _may_mix(name: str, args: Any) -> bool:
    """Return whether CUDA takes tensors of both sides: in copies, and where the host's are indices."""
    if name == "__getitem__":
        return is_marked(args[0])
    if name == "__setitem__":
        indices = [each for each in tree_leaves(args[1]) if isinstance(each, Tensor)]
        copied = not indices or not isinstance(args[2], Tensor) or is_marked(args[2]) == is_marked(args[0])
        return copied and (is_marked(args[0]) or not any(map(is_marked, indices)))
    return name in _COPIES


def _masks(index: Any) -> bool:
    return any(
        isinstance(each, Tensor) and each.dtype is torch.bool and is_marked(each) for each in tree_leaves(index)
    )


@contextmanager
def two_devices(monkeypatch: pytest.MonkeyPatch) -> Iterator[TwoDevices]:
    """Run a block over two devices."""
    from nemodiff_train.runtime.start import Host

    def cuda(tensor: Tensor, *arguments: Any, **named: Any) -> Tensor:
        return tensor.to(GPU)  # the CPU's stand-in turns the name back

    with monkeypatch.context() as patch, TwoDevices() as mode:
        patch.setattr(torch.Tensor, "cuda", cuda)
        patch.setattr(torch.cuda, "mem_get_info", lambda device=None: (1 << 40, 1 << 40))
        patch.setattr(Host, "without_device_rewriting", lambda host: nullcontext())
        yield mode
