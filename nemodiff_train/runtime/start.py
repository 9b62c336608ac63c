"""Decide once what this machine lacks, and fill it in."""

import functools
import logging
import os
import warnings
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partialmethod

import torch
from tqdm import tqdm

from nemodiff_train.console import console
from nemodiff_train.distributed import is_main_process


@dataclass(frozen=True)
class Host:
    """What the machine offers and what stands in for the rest."""

    cuda: bool
    missing_packages: tuple[str, ...]

    @property
    def backend(self) -> str:
        """The collective backend of ``torch.distributed``."""
        return "nccl" if self.cuda else "gloo"

    def without_device_rewriting(self) -> AbstractContextManager[None]:
        """A context for code that makes many small calls of torch and names no CUDA device in them."""
        context: AbstractContextManager[None] = nullcontext() if self.cuda else torch._C.DisableTorchFunction()
        return context

    def __str__(self) -> str:
        device = torch.cuda.get_device_name() if self.cuda else "CPU standing in for CUDA (gloo)"
        without = f"; without {', '.join(self.missing_packages)}" if self.missing_packages else ""
        return f"host: {device}{without}"


def _quiet_third_parties() -> None:
    """A run's console shows the run; ``NEMODIFF_LOG=1`` shows what Megatron and others log as well."""
    if os.environ.get("NEMODIFF_LOG"):
        return
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    # The project shows its own bars.  The environment variable for it is read too early, when torch imports tqdm.
    tqdm.__init__ = partialmethod(tqdm.__init__, disable=True)


def announce(host: Host) -> None:
    """Print one line that says what this machine has, from rank 0."""
    if is_main_process():
        console.print(f"[dim]{host}[/dim]")


@functools.cache
def init_quietly() -> Host:
    """Prepare this process without a word; for one that a prepared process has started, else use ``init_runtime``."""
    _quiet_third_parties()
    cuda = torch.cuda.is_available()
    if not cuda:
        # Compiled code would bypass the device rewriting; read when Megatron decorates its functions.
        os.environ["TORCHDYNAMO_DISABLE"] = "1"
    from nemodiff_train.runtime.deferred import defer_imports

    defer_imports(compiles=cuda)
    if not cuda:
        torch.compile = lambda model=None, **kw: model if model is not None else (lambda m: m)  # TODO
    from nemodiff_train.runtime.packages import keep_compiled_dataset_helpers, stand_in_for_missing_packages

    missing = stand_in_for_missing_packages()
    keep_compiled_dataset_helpers()
    if not cuda:
        from nemodiff_train.runtime.cpu import cpu_as_cuda

        cpu_as_cuda()
        if "OMP_NUM_THREADS" not in os.environ:
            # OpenMP threads wait for each other in a busy loop: one that has to share its core makes
            # small models many times slower.  Processes are the way to use more cores.
            torch.set_num_threads(1)
    return Host(cuda=cuda, missing_packages=missing)
