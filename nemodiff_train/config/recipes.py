"""Finding a recipe, calling it, and applying overrides."""

import importlib.util
import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from nemodiff_train.config.config import TriModeConfig
from nemodiff_train.config.registry import check_recipe, recipe_names
from nemodiff_train.credentials import check_no_secrets
from nemodiff_train.errors import UserError, line_in, nearest
from nemodiff_train.validation.ranges import range_problems
from nemodiff_train.validation.types import check_setting


def load_recipe(name: str, words: Sequence[str]) -> TriModeConfig:
    """The configuration a recipe returns, with ``key=value`` words applied.

    A word without a dot, such as ``data=PREFIX``, is an argument of the recipe's function; one with a
    dot, such as ``train.train_iters=100``, overrides a field of the configuration (Hydra's syntax).

    Args:
        name: A page of ``recipes/`` without ``.py``, or the path of a Python file.
        words: ``key=value`` words from the command line.

    Raises:
        UserError: Unknown recipe, argument or key, with the nearest match; or a word that holds a key or password.
    """
    module = _import(name)
    if not callable(getattr(module, "recipe", None)):
        raise UserError(f"'{name}' has no function 'recipe'; a recipe is a file that defines one")
    pairs = [_split(word) for word in words]
    check_no_secrets(dict(pairs))
    arguments = _arguments(name, module.recipe, {key: value for key, value in pairs if "." not in key})
    config = _called(name, lambda: module.recipe(**arguments))
    if not isinstance(config, TriModeConfig):
        raise UserError(f"recipe '{name}' returns {type(config).__name__}; it has to return a TriModeConfig")
    override(config, {key: value for key, value in pairs if "." in key})
    if found := range_problems(config):
        raise UserError("; ".join(found))
    return config


def _import(name: str) -> ModuleType:
    if name in recipe_names():
        return importlib.import_module(f"recipes.{name}")
    path = Path(name)
    check_recipe(name)
    if not path.is_file():
        raise UserError(f"no recipe file '{name}'")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    loader = spec.loader
    _called(name, lambda: loader.exec_module(module))
    return module


def _called[Result](name: str, call: Callable[[], Result]) -> Result:
    """What a part of a recipe returns; a mistake that the recipe itself makes is told in one line.

    Raises:
        UserError: Names the line of the recipe.
    """
    try:
        return call()
    except SyntaxError as error:
        raise UserError(f"recipe '{name}', line {error.lineno or 1}: {error.msg}") from None
    except ImportError as error:
        raise UserError(f"recipe '{name}' cannot import what it names: {error}") from None
    except Exception as error:
        line = line_in(error, Path(name))
        if line is None or isinstance(error, UserError):
            raise  # a program's own mistake is shown with its traceback
        raise UserError(f"recipe '{name}', line {line}: {type(error).__name__}: {error}") from None


def _split(word: str) -> tuple[str, str]:
    key, equals, value = word.partition("=")
    if not equals:
        raise UserError(f"'{word}' is not of the form key=value")
    if not value and "." not in key:
        raise UserError(f"'{word}' gives nothing; name what {key or 'it'} is, or leave it out")
    return key, value


def _arguments(name: str, function: Any, arguments: dict[str, str]) -> dict[str, Any]:
    """The words as what the recipe's function takes, text or whole numbers."""
    parameters = inspect.signature(function).parameters
    for key in arguments:
        if key not in parameters:
            raise UserError(
                f"recipe '{name}' takes no argument '{key}'; it takes {', '.join(parameters)} "
                f"(fields of the configuration have a dot: section.field=value).{nearest(key, parameters)}"
            )
    missing = [key for key, p in parameters.items() if p.default is p.empty and key not in arguments]
    if missing:
        raise UserError(f"recipe '{name}' needs {', '.join(f'{key}=...' for key in missing)}")
    made: dict[str, Any] = dict(arguments)
    for key, value in arguments.items():
        if parameters[key].annotation is int:
            try:
                made[key] = int(value)
            except ValueError:
                raise UserError(f"recipe '{name}': {key}={value} is no whole number") from None
    return made


def override(config: TriModeConfig, overrides: dict[str, str]) -> TriModeConfig:
    """Set fields of a configuration, ``section.field`` to its new value in Hydra's syntax.

    Raises:
        UserError: Unknown key, with the nearest match, or a value that does not fit.
    """
    from megatron.bridge.training.utils.omegaconf_utils import OverridesError, process_config_with_overrides

    before = {key: _check_key(config, key.lstrip("+~")) for key in overrides}
    try:
        process_config_with_overrides(config, cli_overrides=[f"{k}={v}" for k, v in overrides.items()])
    except (OverridesError, TypeError, ValueError) as error:
        raise UserError(f"cannot apply the overrides: {str(error).splitlines()[-1].strip()}") from None
    for key, old in before.items():
        _check_type(key, old, _check_key(config, key.lstrip("+~")))
        check_setting(config, key.lstrip("+~"))
    return config


def _check_type(key: str, old: Any, new: Any) -> None:
    """Refuse a word where the recipe had a number or a truth value; Hydra takes anything."""
    wanted = "true or false" if isinstance(old, bool) else "a number"
    if isinstance(old, bool | int | float) and not isinstance(new, bool | int | float):
        raise UserError(f"{key}={new} is not {wanted}, as {old} was")


def _check_key(config: TriModeConfig, key: str) -> Any:
    """Walk the dotted key, name the first part that does not exist, and return what is there."""
    node: Any = config
    walked = ""
    for part in key.split("."):
        known = list(node) if isinstance(node, dict) else [n for n in vars(node) if not n.startswith("_")]
        if part not in known:
            raise UserError(
                f"unknown key '{key}': {walked or 'the configuration'} has no '{part}'.{nearest(part, known)}"
            )
        node = node[part] if isinstance(node, dict) else getattr(node, part)
        walked = f"{walked}.{part}" if walked else part
        if node is None or isinstance(node, (str, int, float, list, tuple)):
            break
    return node
