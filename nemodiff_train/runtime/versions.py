"""Facts of a machine and an installation for a bug report, found without importing what may be broken."""

import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata, util
from pathlib import Path
from typing import TYPE_CHECKING

from nemodiff_train import __version__

if TYPE_CHECKING:
    from packaging.specifiers import SpecifierSet

Row = tuple[str, str]
"""A name and what is known of it."""

ROOT = Path(__file__).parents[2]
PACKAGES = {
    "megatron-bridge": "megatron.bridge",
    "megatron-core": "megatron.core",
    "torch": "torch",
    "triton": "triton",
    "transformers": "transformers",
    "datasets": "datasets",
    "transformer-engine": "transformer_engine",
    "apex": "apex",
    "flash-attn-4": "flash_attn.cute",
    "lm-eval": "lm_eval",
}
"""Packages by the name of their distribution, and the module to look for where nothing has recorded a version."""
VARIABLES = re.compile(
    "NEMODIFF_|NCCL_|CUDA_|NVTE_|OMP_|TORCH_NCCL_|SLURM_(GPUS|JOB_GPUS|NNODES)|WANDB_MODE|HF_HUB_OFF"
)
"""Beginnings of the environment's variables that change what a run does; none of them holds a key."""


def machine() -> Iterator[Row]:
    """Yield what runs here: this package, Python, the system, its GPUs and their driver."""
    yield "nemodiff", f"{__version__}, {_commit()}, in {ROOT}"
    yield "Python", f"{platform.python_version()} in {sys.prefix}"
    yield "platform", platform.platform()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    yield "processor", f"{len(os.sched_getaffinity(0))} cores, {memory:.0f} GB"
    listed = _output("nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader")
    yield from (("GPU and driver", line) for line in (listed or "none that nvidia-smi finds").splitlines())
    set_here = {name: value for name, value in sorted(os.environ.items()) if VARIABLES.match(name)}
    yield "environment", ", ".join(f"{name}={value}" for name, value in set_here.items()) or "nothing set"


def packages() -> Iterator[Row]:
    """Yield the versions of the packages that decide what a run does, beside those that were tested."""
    pins, ranges = pinned(), _ranges()
    for name, module in PACKAGES.items():
        version = installed(name)
        if version is None:
            yield name, "installed, without a recorded version" if _is_there(module) else "not installed"
            continue
        pin = pins.get(name)
        compared = "" if pin is None else "as tested" if version == pin else f"tested with {pin}"
        if name in ranges and not ranges[name].contains(version, prereleases=True):
            compared = f"OUTSIDE {ranges[name]}; {compared}"
        yield name, f"{version:<16}{compared}".rstrip()


def installed(distribution: str) -> str | None:
    """Return the version of a distribution, or None where none is recorded."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def pinned() -> dict[str, str]:
    """Return the versions of ``constraints.txt``; none where this package was installed without its repository."""
    file = ROOT / "constraints.txt"
    lines = file.read_text().splitlines() if file.is_file() else []
    return {name: version.strip() for name, _, version in (line.partition("==") for line in lines) if version}


def _ranges() -> "dict[str, SpecifierSet]":
    """Return what this package asks of the versions of others; nothing where that cannot be read."""
    try:
        from packaging.requirements import Requirement

        wanted = [Requirement(line) for line in metadata.requires("nemodiff-train") or []]
    except (ImportError, metadata.PackageNotFoundError):
        return {}
    return {requirement.name: requirement.specifier for requirement in wanted if requirement.specifier}


def _is_there(module: str) -> bool:
    try:
        return util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def _commit() -> str:
    if not (ROOT / ".git").exists():
        return "installed without its repository"
    git = ("git", "-C", str(ROOT))
    changed = " with changes" if _output(*git, "status", "--porcelain", "--untracked-files=no") else ""
    return f"commit {_output(*git, 'rev-parse', '--short=12', 'HEAD') or 'unknown'}{changed}"


def _output(*command: str) -> str:
    """Return what a program prints, or nothing where it is missing, fails or hangs."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
