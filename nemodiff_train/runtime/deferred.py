"""Import only what is used: packages that load at the first use of a name, instead of where they are imported.

Megatron, Bridge, Transformers and torch import at the top of their modules far more than a run calls: ModelOpt with
scikit-learn, SciPy and pandas below it, wandb, torch's compiler, and every model family of Bridge.  Two finders put
that off.  Whoever uses a name gets the real object of the real package; only the time of the import changes.

* :class:`_DeferredFinder`: the modules of a few packages are empty at first.  Asking one for a name imports the real
  package.  Names that others take by ``from ... import`` at the top of their modules, and use in functions, are bound
  to stand-ins until then; the import binds the real objects wherever a stand-in is held.
* :class:`_UnexecutedFinder`: the ``__init__.py`` of Bridge's packages, which import everything below them, are not
  executed.  A name that one imports comes from the module that has it; any other name executes the file.

A new version of a package that imports other names finds them: it only starts more slowly.
"""

import ast
import contextlib
import functools
import importlib
import importlib.abc
import importlib.machinery
import importlib.metadata
import importlib.util
import sys
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from nemodiff_train.runtime.packages import without_stand_ins
from nemodiff_train.runtime.replace import REPLACED, replace

DEFERRED = (
    "datasets",
    "modelopt",
    "multistorageclient",
    "scipy",
    "sklearn",
    "transformers.models.auto.processing_auto",
    "transformers.models.qwen3_vl.processing_qwen3_vl",
    "wandb",
)
"""Packages and modules that are empty until a name of theirs is used."""

DEFERRED_WITHOUT_COMPILER = ("torch._dynamo", "torch.fx.experimental.symbolic_shapes")
"""Further ones where torch compiles nothing: its compiler, and what loads SymPy for it."""

UNEXECUTED = "megatron.bridge"
"""Package whose ``__init__.py``, and those of the packages below it, import everything that lies there."""

_ASKED = ("__all__", "__version__")
"""Names with underscores whose use counts; inspect asks every module for others."""


class _DeferredModule(types.ModuleType):
    """A module of a deferred package."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name not in _ASKED:
            raise AttributeError(name)
        make = _STAND_INS.get(self.__name__, {}).get(name)
        if make is None or _FINDER.root(self.__name__) is None:
            return getattr(_load(self.__name__), name)
        stand_in = make(self.__name__, name)
        _FINDER.handed_out.append((stand_in, self.__name__, name))
        return stand_in


def _load(module: str) -> types.ModuleType:
    """Import the real module, and bind the real objects in the place of its package's stand-ins."""
    root = _FINDER.root(module)
    if root is not None:
        _FINDER.roots.remove(root)
        empty = {name: held for name, held in sys.modules.items() if _is_in(name, root)}
        for name, held in empty.items():
            if isinstance(held, _DeferredModule):
                del sys.modules[name]
        with without_stand_ins():  # ModelOpt would take a stand-in for Transformer Engine
            real = {id(held): importlib.import_module(name) for name, held in empty.items()}
            for stand_in, origin, name in _FINDER.handed_out:
                if _is_in(origin, root):
                    real[id(stand_in)] = getattr(importlib.import_module(origin), name)
                    if isinstance(stand_in, _Settings):
                        vars(real[id(stand_in)]).update(vars(stand_in))
        for holder in [held for held in sys.modules.values() if isinstance(held, types.ModuleType)]:
            for name, value in list(vars(holder).items()):
                if id(value) in real and value is not real[id(value)]:
                    setattr(holder, name, real[id(value)])
    return importlib.import_module(module)


def _is_in(module: str, root: str) -> bool:
    return module == root or module.startswith(root + ".")


class _StandIn:
    """A function or class that is imported when it is called, or asked for something.

    Args:
        module: Where the real one is.
        name: Its name there.
        nothing_to_do: Whether the real function would only return None for its arguments, unless it is imported yet.
    """

    def __init__(self, module: str, name: str, nothing_to_do: Callable[..., bool] | None = None) -> None:
        self._module, self._name, self._nothing_to_do = module, name, nothing_to_do

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        if self._nothing_to_do and _FINDER.root(self._module) and self._nothing_to_do(*arguments, **named):
            return None
        return getattr(_load(self._module), self._name)(*arguments, **named)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(getattr(_load(self._module), self._name), name)

    def __or__(self, other: Any) -> Any:
        return Any  # in an annotation

    __ror__ = __or__


def _unless(nothing_to_do: Callable[..., bool]) -> Callable[[str, str], _StandIn]:
    return lambda module, name: _StandIn(module, name, nothing_to_do)


class _Settings(types.SimpleNamespace):
    """Takes settings for a module, which gets them when it is imported."""

    def __init__(self, module: str, name: str) -> None:
        super().__init__()


def _class(module: str, name: str) -> type:
    """Return a class for ``isinstance`` and ``except``: who makes an object of the real one has imported it."""
    return type(name, (Exception,), {"__module__": module})


def _identity_decorator(module: str, name: str) -> Callable[..., Any]:
    """Return a decorator for a compiler that is off: it returns the function that it is given."""

    def decorate(function: Any = None, *arguments: Any, **named: Any) -> Any:
        return function if function is not None else lambda decorated: decorated

    return decorate


def _does_nothing(module: str, name: str) -> Callable[..., None]:
    """Return a function for one that speaks to a compiler that is off."""
    return lambda *arguments: None


def _returns_its_argument(module: str, name: str) -> Callable[..., Any]:
    """Return a function for one that asks whether a value is symbolic: who makes such values has imported it."""
    return lambda value, *arguments: value


def _part(module: str, name: str) -> types.ModuleType:
    """Return a module of a deferred package that others reach by the package's name, without importing it."""
    return importlib.import_module(f"{module}.{name}")


def _empty_caches(module: str, name: str) -> Any:
    """Return ``torch._dynamo.trace_rules`` for the one function that torch.distributed calls in it."""
    return types.SimpleNamespace(clear_lru_cache=lambda: None)


def _never_converted(*arguments: Any, **named: Any) -> bool:
    """Return True: converting a model takes the real ModelOpt, so none is converted before its import."""
    return True


def _holds_no_state(model: Any, state_dict: dict[str, Any]) -> bool:
    return not any(key.startswith("modelopt_state") for key in state_dict)


_STAND_INS: dict[str, dict[str, Callable[[str, str], Any]]] = {
    "datasets": {"builder": _Settings, "concatenate_datasets": _StandIn, "load_dataset": _StandIn},
    "modelopt.torch.distill.plugins.megatron": {
        "get_tensor_shapes_adjust_fn_for_distillation": _unless(_never_converted)
    },
    "modelopt.torch.opt.dynamic": {"DynamicModule": _class},
    "modelopt.torch.opt.plugins": {
        "restore_modelopt_state": _unless(_holds_no_state),
        "save_modelopt_state": _unless(_never_converted),
        "save_sharded_modelopt_state": _unless(_never_converted),
    },
    "modelopt.torch.opt.plugins.mcore_dist_checkpointing": {"_load_extra_state_from_sharded_checkpoint": _StandIn},
    "modelopt.torch.quantization.utils": {"is_quantized": _unless(_never_converted)},
    "scipy.optimize": {"linear_sum_assignment": _StandIn},
    "sklearn.metrics": {"roc_curve": _StandIn},
    "torch._dynamo": {
        "allow_in_graph": _identity_decorator,
        "assume_constant_result": _identity_decorator,
        "disable": _identity_decorator,
        "eval_frame": _part,
        "graph_break": _does_nothing,
        "trace_rules": _empty_caches,
    },
    "torch._dynamo.eval_frame": {"OptimizedModule": _class},
    "torch._dynamo._trace_wrapped_higher_order_op": {"TransformGetItemToIndex": _StandIn},
    "torch.fx.experimental.symbolic_shapes": {
        "expect_true": _returns_its_argument,
        "guard_or_false": _StandIn,
        "statically_known_true": _StandIn,
        "GuardOnDataDependentSymNode": _class,
    },
    "transformers.models.auto.processing_auto": {"AutoProcessor": _StandIn},
    "transformers.models.qwen3_vl.processing_qwen3_vl": {"Qwen3VLProcessor": _StandIn},
}
"""Stand-ins for names that others import at the top of a module: a maker for each name, by module."""


class _DeferredFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds the modules of deferred packages, empty."""

    def __init__(self) -> None:
        self.roots: list[str] = []
        """Modules that are still deferred."""
        self.handed_out: list[tuple[Any, str, str]] = []
        """Stand-ins, each with the module and the name of the real object."""

    def root(self, module: str) -> str | None:
        """Return the deferred package that a module belongs to, or None if it is imported as usual."""
        return next((root for root in self.roots if _is_in(module, root)), None)

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if self.root(name) is None:
            return None
        real = importlib.machinery.PathFinder.find_spec(name, path)
        if real is None:
            return None  # not installed, or no such module: the import fails as it should
        spec = importlib.machinery.ModuleSpec(name, self, origin=real.origin)
        spec.submodule_search_locations = real.submodule_search_locations
        return spec

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return _DeferredModule(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        module.__file__ = module.__spec__.origin if module.__spec__ else None


class _UnexecutedModule(types.ModuleType):
    """A package whose ``__init__.py`` has not been executed."""

    source_loader: importlib.machinery.SourceFileLoader
    origins: dict[str, tuple[str, str]]
    """Module, and name there, of each name that the file imports."""
    executed = False

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name not in _ASKED:
            raise AttributeError(name)
        if not self.executed and name in self.origins:
            module, attribute = self.origins[name]
            value = getattr(importlib.import_module(module), attribute)
            setattr(self, name, value)
            return value
        if not self.executed and importlib.util.find_spec(f"{self.__name__}.{name}"):
            return importlib.import_module(f"{self.__name__}.{name}")  # ``from package import module``
        execute(self.__name__)
        if name in vars(self):
            return vars(self)[name]
        raise AttributeError(f"module '{self.__name__}' has no attribute '{name}'")


def execute(package: str) -> None:
    """Execute the ``__init__.py`` of a package of Bridge, and those below it, with all that they import."""
    _UNEXECUTED_FINDER.executed.append(package)
    for name in [name for name in sys.modules if _is_in(name, package)]:
        module = sys.modules[name]
        if isinstance(module, _UnexecutedModule) and not module.executed:
            module.executed = True
            module.source_loader.exec_module(module)


def _origins(source: str, package: str) -> dict[str, tuple[str, str]]:
    """Return the module, and the name there, of each name that a package's source imports from below it."""
    origins = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.ImportFrom) and node.module:
            module = importlib.util.resolve_name("." * node.level + node.module, package)
            origins.update({alias.asname or alias.name: (module, alias.name) for alias in node.names})
    return {name: origin for name, origin in origins.items() if origin[0].startswith(f"{UNEXECUTED}.")}


class _UnexecutedFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds packages and leaves their ``__init__.py`` unexecuted."""

    def __init__(self) -> None:
        self.executed: list[str] = []
        """Packages that are imported as usual, with those below them."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if not _is_in(name, UNEXECUTED) or any(_is_in(name, package) for package in self.executed):
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        if spec is None or spec.submodule_search_locations is None:
            return None
        if not isinstance(spec.loader, importlib.machinery.SourceFileLoader):
            return None
        spec.loader_state, spec.loader = spec.loader, self
        return spec

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return _UnexecutedModule(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        assert isinstance(module, _UnexecutedModule) and module.__spec__ is not None
        module.source_loader = module.__spec__.loader_state
        module.origins = _origins(Path(module.source_loader.path).read_text(), module.__name__)


class _Distributions(Mapping[str, list[str]]):
    """Answer as :func:`importlib.metadata.packages_distributions` does, without reading about every package at once.

    Transformers asks at its import which distribution has torch, say, and takes the one of the same name.
    """

    def __getitem__(self, package: str) -> list[str]:
        name = package.replace("_", "-")
        with contextlib.suppress(importlib.metadata.PackageNotFoundError, ValueError):
            importlib.metadata.distribution(name)
            return [name]
        return self._all[package]

    def get(self, package: str, default: Any = None) -> Any:
        return self._all.get(package, default)

    def __iter__(self) -> Iterator[str]:
        return iter(self._all)

    def __len__(self) -> int:
        return len(self._all)

    @functools.cached_property
    def _all(self) -> Mapping[str, list[str]]:
        return dict(REPLACED["importlib.metadata.packages_distributions"]())


_FINDER = _DeferredFinder()
_UNEXECUTED_FINDER = _UnexecutedFinder()


def defer_imports(compiles: bool) -> None:
    """Put the finders in front of all others; call before anything imports Megatron or Transformers.

    Args:
        compiles: Whether torch compiles functions on this machine.

    Until: for :class:`_Distributions`, Transformers asks for one distribution by its name (not in 5.12.1).
    """
    if _FINDER in sys.meta_path:
        return
    candidates = DEFERRED if compiles else DEFERRED + DEFERRED_WITHOUT_COMPILER
    _FINDER.roots = [root for root in candidates if root not in sys.modules]
    sys.meta_path[:0] = [_FINDER, _UNEXECUTED_FINDER]
    replace(importlib.metadata, "packages_distributions", _Distributions, takes="")
