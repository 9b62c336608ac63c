"""Find a recipe, call it with the arguments of the command line, and apply overrides."""

import importlib
import inspect
import runpy
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from nemodiff_train.config.config import TriModeConfig
from nemodiff_train.config.overrides import override
from nemodiff_train.config.registry import check_names, check_recipe, is_field, recipe_modules, split_file, split_word
from nemodiff_train.credentials import check_no_secrets
from nemodiff_train.errors import UserError, line_in

Recipe = Callable[..., TriModeConfig]


def load_recipe(name: str, words: Sequence[str]) -> TriModeConfig:
    """Return the configuration of a recipe with ``key=value`` words applied.

    A word without a dot, such as ``data=PREFIX``, is an argument of the recipe; one with a dot, such as
    ``train.train_iters=100``, and ``mixed_precision``, override a field of the configuration (Hydra's syntax).

    Args:
        name: A function in ``recipes/``, or ``FILE.py[:function]``.
        words: ``key=value`` words from the command line.

    Raises:
        UserError: Unknown recipe, argument or key, with the nearest match; or a word that holds a key or password.
    """
    recipe = _import_recipe(name)
    pairs = [split_word(word) for word in words]
    check_no_secrets(dict(pairs))
    parameters = inspect.signature(recipe).parameters
    required = [key for key, parameter in parameters.items() if parameter.default is parameter.empty]
    arguments: dict[str, str | int] = {key: value for key, value in pairs if not is_field(key)}
    check_names(name, arguments, parameters, required)
    for key, value in arguments.items():
        if parameters[key].annotation is int:
            try:
                arguments[key] = int(value)
            except ValueError:
                raise UserError(f"recipe '{name}': {key}={value} is not a whole number; use an integer") from None
    config = _report_mistakes(name, lambda: recipe(**arguments))
    if not isinstance(config, TriModeConfig):
        raise UserError(f"recipe '{name}' returns {type(config).__name__}; it has to return a TriModeConfig")
    config = override(config, {key: value for key, value in pairs if is_field(key)})
    config.resolve_fractions()
    if config.checkpoint.save and config.checkpoint.save_interval == 0:  # trials in Python may keep nothing
        raise UserError("checkpoint.save_interval is 0, so that nothing would be kept; use 1 or more")
    return config


def recipe_defaults(name: str, words: Sequence[str]) -> dict[str, Any]:
    """Return the settings that a recipe has by itself, with its required arguments alone.

    Args:
        name: As :func:`load_recipe` takes it.
        words: All words of the command line.
    """
    parameters = inspect.signature(_import_recipe(name)).parameters
    required = {key for key, parameter in parameters.items() if parameter.default is parameter.empty}
    return load_recipe(name, [word for word in words if word.partition("=")[0] in required]).settings()


def describe_recipe(name: str) -> str:
    """Return the arguments of a recipe with their defaults, and its docstring.

    Raises:
        UserError: There is no such recipe.
    """
    recipe = _import_recipe(name)
    lines = [f"recipe {name}:", *(f"  {line}".rstrip() for line in (inspect.getdoc(recipe) or "").splitlines()), ""]
    for key, parameter in inspect.signature(recipe).parameters.items():
        required = parameter.default is parameter.empty
        lines.append(f"  {key}=..." if required else f"  {key}={parameter.default}")
    return "\n".join([*lines, "  section.field=value overrides a field of the configuration that it returns"])


def _import_recipe(name: str) -> Recipe:
    check_recipe(name)
    if module_name := recipe_modules().get(name):
        recipe: Recipe = getattr(importlib.import_module(f"recipes.{module_name}"), name)
        return recipe
    file, function = split_file(name) or (Path(name), "recipe")
    namespace = run_file(file)
    if not callable(namespace.get(function)):
        raise UserError(f"'{file}' has no function '{function}'; define it there, or name another: {file}:FUNCTION")
    recipe = namespace[function]
    return recipe


def run_file(file: Path) -> dict[str, Any]:
    """Run a recipe's file, once per process and version of the file, and return the names that it defines.

    Raises:
        UserError: There is no such file, or it cannot be run; names the line.
    """
    if not file.is_file():
        raise UserError(f"no recipe file '{file}'; check the path, or see 'nemodiff train --list'")
    state = file.stat()
    return _report_mistakes(str(file), lambda: _run_file(file.resolve(), state.st_mtime_ns, state.st_size))


@cache
def _run_file(file: Path, *version: int) -> dict[str, Any]:
    # Not imported, which would leave compiled files in the user's folder.
    return runpy.run_path(str(file), run_name=file.stem)


def _report_mistakes[Result](name: str, call: Callable[[], Result]) -> Result:
    """Run a part of a recipe and report the user's mistakes in one line."""
    file = (split_file(name) or (Path(name), ""))[0]
    try:
        return call()
    except SyntaxError as error:
        raise UserError(f"recipe '{file}', line {error.lineno or 1}: {error.msg}") from None
    except ImportError as error:
        raise UserError(f"recipe '{file}' cannot import what it names: {error}") from None
    except Exception as error:
        line = line_in(error, file)
        if line is None or isinstance(error, UserError):
            raise  # a mistake of this program keeps its traceback
        raise UserError(f"recipe '{file}', line {line}: {type(error).__name__}: {error}") from None
