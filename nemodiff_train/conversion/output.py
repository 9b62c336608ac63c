"""An output folder that appears complete or not at all, also where several processes write it."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from nemodiff_train.console import is_main_process
from nemodiff_train.errors import UserError
from nemodiff_train.evaluation.files import check_can_be_made


def check_free(output: Path) -> None:
    """Refuse an output that exists, or that no folder can be made for; makes nothing.

    Raises:
        UserError: Names the output.
    """
    if output.exists():
        raise UserError(f"'{output}' exists already; name a folder that does not, or remove it")
    check_can_be_made(output.parent)


@contextmanager
def complete_or_absent(output: Path) -> Iterator[Path]:
    """A folder to write into that becomes ``output`` on success and vanishes on failure.

    Every process of a gang enters and leaves it; one that fails takes the folder with it, so that the
    others cannot finish.

    Raises:
        UserError: The disk is full, or cannot be written to.
    """
    check_free(output)
    partial = output.with_name(f".{output.name}.partial")
    together()
    if is_main_process():
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    together()
    try:
        with torch.no_grad():
            yield partial
        together()
        if is_main_process():
            partial.rename(output)
        together()
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise UserError(f"cannot write '{output}': {error.strerror or error}") from None
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def together() -> None:
    """Wait for the other processes of the gang, if there are any."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.barrier()


def everywhere(own: Any) -> list[Any]:
    """What every process has, by rank, in every process."""
    if not dist.is_initialized():
        return [own]
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, own)
    return found


def rank() -> int:
    """This process's number in the gang."""
    return dist.get_rank() if dist.is_initialized() else 0
