"""Inert stand-ins for packages that are not installed.

Megatron Bridge imports a few packages at module level for model kinds and services that this project
does not use (vision encoders, energon data sets, fault-tolerance launchers).  Where such a package is
installed, nothing here touches it.
"""

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

# Imported by megatron.bridge without a guard.  Everything else that is missing should fail loudly.
OPTIONAL_PACKAGES = ("megatron.energon", "nvidia_resiliency_ext", "transformer_engine")

# Installed with this project; tools/gpu_check leaves them out, since what it brings along has to be small.
LARGE_PACKAGES = ("datasets", "multistorageclient", "pulp", "scipy", "wandb")

# Below them: what Megatron imports with a guard, to take something of its own where it is missing.
GUARDED = ("transformer_engine.pytorch.optimizers",)


def _placeholder(name: str) -> Any:
    """Return an attribute of a stand-in: a class for ``CamelCase``, else a module of placeholders."""
    if name.startswith("__"):
        raise AttributeError(name)
    if name[0].isupper():
        return type(name, (torch.nn.Module,), {"__class_getitem__": classmethod(lambda cls, item: cls)})
    module = types.ModuleType(name)
    module.__getattr__ = _placeholder  # type: ignore[method-assign]
    return module


class _StandInFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds the packages it was given, and every module below them, as empty modules."""

    def __init__(self, packages: Sequence[str]) -> None:
        self.packages = tuple(packages)

    def find_spec(
        self, name: str, path: Any = None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name in GUARDED:
            return None
        if any(name == package or name.startswith(package + ".") for package in self.packages):
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def exec_module(self, module: types.ModuleType) -> None:
        module.__version__ = "0.0.0"  # type: ignore[attr-defined]
        module.__getattr__ = _placeholder  # type: ignore[method-assign]


def _is_missing(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is None
    except ModuleNotFoundError:
        return True


def stand_in_for(packages: Sequence[str]) -> tuple[str, ...]:
    """Make those of some packages importable that are not installed.

    Returns:
        The names that were missing, so that the caller can tell the user.
    """
    missing = tuple(package for package in packages if _is_missing(package))
    sys.meta_path.append(_StandInFinder(missing))
    return missing


@contextmanager
def without_stand_ins() -> Iterator[None]:
    """Let what is missing be missing, while the context is entered."""
    finders = [finder for finder in sys.meta_path if isinstance(finder, _StandInFinder)]
    modules = {
        name: module
        for name, module in sys.modules.items()
        if isinstance(getattr(getattr(module, "__spec__", None), "loader", None), _StandInFinder)
    }
    sys.meta_path[:] = [finder for finder in sys.meta_path if finder not in finders]
    for name in modules:
        del sys.modules[name]
    try:
        yield
    finally:
        sys.meta_path.extend(finders)
        sys.modules.update(modules)
