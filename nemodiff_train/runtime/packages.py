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
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

# Imported by megatron.bridge without a guard.  Everything else that is missing should fail loudly.
OPTIONAL_PACKAGES = ("megatron.energon", "nvidia_resiliency_ext", "transformer_engine")

# Installed with this project; tools/gpu_check leaves them out, since what it brings along has to be small.
LARGE_PACKAGES = ("datasets", "multistorageclient", "pulp", "scipy", "wandb")


def _placeholder(name: str) -> Any:
    """What an attribute of a stand-in is: a class for ``CamelCase``, else a module of placeholders."""
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


def _fix_absence_of_transformer_engine() -> None:
    """Let Megatron-Core and ModelOpt see that Transformer Engine is absent before a stand-in misleads them.

    Core's modules probe its version while they are imported, hence the version set by hand: the
    oldest that takes every branch of those probes without touching the package.
    """
    import megatron.core.utils as core_utils
    from packaging.version import Version

    core_utils._te_version = Version("2.12.0")
    importlib.import_module("megatron.core.extensions.transformer_engine")
    importlib.import_module("megatron.core.models.gpt.gpt_layer_specs")
    _let_the_distributed_optimizer_resume()


def _let_the_distributed_optimizer_resume() -> None:
    """Without Transformer Engine, mend three things that keep a distributed optimizer from loading a checkpoint.

    Megatron-Core first reads the step number from the state of the new optimizer, and stops because
    torch's Adam has none before its first step: it is given one, which the checkpoint overwrites.
    Then it expects a step number of every parameter in the checkpoint, where there is one for all.
    Afterwards Core leaves one tensor as the step number of all parameters, and torch's Adam, which counts
    in place, would count it up once for each of them: every parameter is given its own.
    """
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    plain_state_dict: Any = DistributedOptimizer.state_dict
    plain_load: Any = DistributedOptimizer.load_state_dict
    plain_set: Any = DistributedOptimizer._set_main_param_and_optimizer_states

    def state_dict(self: Any) -> Any:
        inner = self.optimizer
        if isinstance(inner, torch.optim.Adam) and not inner.state:
            for parameter in (p for group in inner.param_groups for p in group["params"]):
                moments = {name: torch.zeros_like(parameter.data) for name in ("exp_avg", "exp_avg_sq")}
                inner.state[parameter] = {"step": torch.tensor(0.0), **moments}
        return plain_state_dict(self)

    def load_state_dict(self: Any, loaded: Any) -> None:
        plain_load(self, loaded)
        for state in self.optimizer.state.values():
            if "step" in state:
                state["step"] = state["step"].clone()

    def set_states(self: Any, parameter: Any, tensors: dict[str, Any]) -> None:
        plain_set(self, parameter, {**tensors, "step": None})  # what is no tensor is left as it is

    DistributedOptimizer._set_main_param_and_optimizer_states = set_states
    DistributedOptimizer.state_dict = state_dict
    DistributedOptimizer.load_state_dict = load_state_dict


def keep_compiled_dataset_helpers() -> None:
    """Use the data-set helpers that came compiled with Megatron-Core's wheel.

    Megatron compiles them anew at every start, from a Makefile that the wheel leaves out.
    """
    import megatron.core.datasets.utils as dataset_utils

    directory = Path(dataset_utils.__file__).parent
    if not (directory / "Makefile").exists() and any(directory.glob("helpers_cpp*.so")):
        dataset_utils.compile_helpers = lambda: None


def patch_peft_te_flag() -> None:
    """Tell Bridge's adapters whether Transformer Engine is there: where it is not, Core's names for it are None."""
    import megatron.bridge.peft.utils as adapters
    from megatron.core.extensions.transformer_engine import HAVE_TE

    adapters.HAVE_TE = HAVE_TE


def stand_in_for_missing_packages() -> tuple[str, ...]:
    """Make the optional packages that are not installed importable.

    Returns:
        The names that were missing, so that the caller can tell the user.
    """
    large = tuple(package for package in LARGE_PACKAGES if _is_missing(package))
    sys.meta_path.append(_StandInFinder(large))  # ModelOpt imports them, so before it is imported
    missing = tuple(package for package in OPTIONAL_PACKAGES if _is_missing(package))
    if "transformer_engine" in missing:
        _fix_absence_of_transformer_engine()
    sys.meta_path.append(_StandInFinder(missing))
    return (*missing, *large)
