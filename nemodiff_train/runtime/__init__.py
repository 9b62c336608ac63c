"""Run Megatron where some of what it expects is missing, and without what it imports but this project never calls.

* :mod:`~nemodiff_train.runtime.start` finds out what this machine has, and prepares the process for it;
* :mod:`~nemodiff_train.runtime.packages` stands in for packages that Megatron imports without a guard;
* :mod:`~nemodiff_train.runtime.cpu` is the CPU backend: the CPU in the place of CUDA, where no GPU works.

:func:`init_runtime` does all of it, once, and must run before anything imports ``megatron``.  This package imports
none of these modules by itself, so that the command line can refuse arguments without loading torch.
"""

import functools
import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nemodiff_train.runtime.start import Host


@functools.cache
def init_runtime() -> "Host":
    """Make ``megatron`` importable and runnable on this machine, and print one line that says what was done.

    Returns:
        What the machine has; the same object at every call.
    """
    with _gc_paused():
        from nemodiff_train.runtime.start import announce, init_quietly

        host = init_quietly()
    announce(host)
    return host


@functools.cache
def init_without_device() -> None:
    """Spare a process that only reads and writes data the imports of a run; after :func:`init_runtime` do nothing."""
    with _gc_paused():
        from nemodiff_train.runtime import cpu, deferred, start

        if not start.init_quietly.cache_info().currsize:
            start.quiet_third_parties()
            deferred.defer_imports(compiles=False)
            cpu.disable_torch_compile()


@contextmanager
def _gc_paused() -> Iterator[None]:
    """Collect no garbage during imports, nor later what they have made: that takes a tenth of the time of a start."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if collects:
            gc.enable()
