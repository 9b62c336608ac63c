"""Decide once what this machine lacks, and fill it in."""

import functools
import importlib
import importlib.util
import logging
import os
import warnings
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partialmethod
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from nemodiff_train.console import say
from nemodiff_train.errors import UserError
from nemodiff_train.processes import exit_only_with_parent
from nemodiff_train.runtime.cpu import disable_torch_compile, redirect_cuda_to_cpu
from nemodiff_train.runtime.deferred import defer_imports
from nemodiff_train.runtime.packages import LARGE_PACKAGES, OPTIONAL_PACKAGES, stand_in_for
from nemodiff_train.runtime.replace import REPLACED, replace


@dataclass(frozen=True)
class Host:
    """Hardware and packages of the machine, and the stand-ins for the rest."""

    cuda: bool
    missing_packages: tuple[str, ...]

    @property
    def backend(self) -> str:
        """Return the collective backend of ``torch.distributed``."""
        return "nccl" if self.cuda else "gloo"

    def without_device_rewriting(self) -> AbstractContextManager[None]:
        """Return a context for code that makes many small calls of torch and names no CUDA device in them."""
        context: AbstractContextManager[None] = nullcontext() if self.cuda else torch._C.DisableTorchFunction()
        return context

    def __str__(self) -> str:
        device = torch.cuda.get_device_name() if self.cuda else "CPU standing in for CUDA (gloo)"
        without = f"; without {', '.join(self.missing_packages)}" if self.missing_packages else ""
        return f"host: {device}{without}"


def quiet_third_parties() -> None:
    """Keep the console for the run; ``NEMODIFF_LOG=1`` shows what Megatron and others log as well."""
    if os.environ.get("NEMODIFF_LOG"):
        return
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    _hide_bars()


def _hide_bars() -> None:
    """Let tqdm show nothing: the project shows its own bars.

    Until: tqdm reads its environment variable at its first bar (4.70.1 reads it at its import, which is torch's).
    """
    replace(tqdm, "__init__", partialmethod(tqdm.__init__, disable=True), takes="self, iterable, desc, total, ...")


def _prepare_cuda() -> None:
    """Set what CUDA and Transformer Engine read from the environment, before they start."""
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")  # Core overlaps tensor parallelism only in this order
    for name in ("NVTE_FLASH_ATTN", "NVTE_FUSED_ATTN"):  # Core asserts values, of attention that is not used here
        os.environ.pop(name, None)


def _refuse_broken_cuda() -> None:
    """Refuse to compute on the CPU where a GPU was meant; ``NEMODIFF_CPU=1`` says that it was not."""
    # A user hides the GPUs by one of these values; SLURM those that a step has not asked for, by "NoDevFiles".
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES", "all") in ("", "-1")
    given = os.environ.get("SLURM_GPUS_ON_NODE") or os.environ.get("SLURM_JOB_GPUS")
    if hidden or os.environ.get("NEMODIFF_CPU") == "1" or not (given or Path("/dev/nvidia0").exists()):
        return
    in_job = "SLURM_JOB_ID" in os.environ
    try:
        torch.cuda.init()
        reason = "torch finds none"
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
    raise UserError(
        f"this machine has a GPU, but CUDA does not work ({reason}); fix the driver, or install torch for its CUDA "
        f"version{' (under SLURM: let the step ask for GPUs, STEP_GPUS in slurm/site.env)' if in_job else ''}. "
        "NEMODIFF_CPU=1 computes on the CPU"
    )


def _refuse_broken_engine() -> None:
    """Refuse a Transformer Engine that cannot be imported, for example one that was built for another torch."""
    if importlib.util.find_spec("transformer_engine") is None:
        return
    try:
        importlib.import_module("transformer_engine.pytorch")
    except Exception as error:  # of the loader, of CUDA, or its own
        reason = str(error).partition("\n")[0]
        raise UserError(
            f"Transformer Engine is installed but cannot be imported ({type(error).__name__}: {reason}); install the "
            f"one that was built for torch {torch.__version__}, or remove it: Megatron-Core's layers take its place"
        ) from error


def announce(host: Host) -> None:
    """Print one line that says what this machine has, from rank 0."""
    say(str(host), "dim")


@functools.cache
def init_quietly() -> Host:
    """Prepare this process and print nothing; for one that a prepared process has started, else ``init_runtime``."""
    cuda = torch.cuda.is_available()
    if cuda:
        _prepare_cuda()
    else:
        _refuse_broken_cuda()
    quiet_third_parties()
    _refuse_broken_engine()
    defer_imports(compiles=cuda)
    if not cuda:
        disable_torch_compile()
    large = stand_in_for(LARGE_PACKAGES)
    # This imports Core, which is to see what is missing, before there are stand-ins for it.
    from nemodiff_train.runtime import patches

    if patches.HAVE_TE:
        patches.limit_fused_rope()
    else:
        patches.mark_te_as_missing()
        patches.load_torch_adam()
    missing = stand_in_for(OPTIONAL_PACKAGES)
    patches.parse_yaml_in_c()
    patches.keep_compiled_dataset_helpers()
    patches.end_save_helpers_with_rank(save_worker)
    patches.start_writer_alone()
    if not cuda:
        patches.keep_random_states_on_cpu()
        patches.copy_tensors_before_save()
        redirect_cuda_to_cpu()
        if "OMP_NUM_THREADS" not in os.environ:
            # OpenMP threads wait for each other in a busy loop: one that has to share its core makes
            # small models many times slower.  Processes are the way to use more cores.
            torch.set_num_threads(1)
    return Host(cuda=cuda, missing_packages=(*missing, *large))


def save_worker(*arguments: Any) -> None:
    """Run Core's loop for asynchronous saves, in a process that Core has just started and nothing has prepared."""
    exit_only_with_parent()
    init_quietly()
    REPLACED["megatron.core.dist_checkpointing.strategies.async_utils.PersistentAsyncCaller.async_loop"](*arguments)
