"""The names of the recipes, found without importing one."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import recipes
from nemodiff_train.errors import UserError, nearest

_FILE = re.compile(r"(?P<file>.*\.py)(?::(?P<function>[A-Za-z_]\w*))?", re.DOTALL)


def recipe_modules() -> dict[str, str]:
    """Return the module of every recipe by name: recipes are the public, lower-case names of ``recipes/*.py``."""
    return {name: file for file, (_, names) in recipe_files().items() for name in names}


def recipe_files() -> dict[str, tuple[str, list[str]]]:
    """Return for every module of recipes the first line of its docstring, and the names of its recipes."""
    modules = {file.stem: ast.parse(file.read_text()) for file in sorted(Path(recipes.__path__[0]).glob("*.py"))}
    described = {
        name: ((ast.get_docstring(module) or "").partition("\n")[0], list(_defined_names(module)))
        for name, module in modules.items()
    }
    return {name: (summary, names) for name, (summary, names) in described.items() if names}


def _defined_names(module: ast.Module) -> Iterator[str]:
    for statement in module.body:
        if isinstance(statement, ast.FunctionDef):
            names = [statement.name]
        elif isinstance(statement, ast.Assign):
            names = [
                node.id for target in statement.targets for node in ast.walk(target) if isinstance(node, ast.Name)
            ]
        else:
            continue
        yield from (name for name in names if name.islower() and not name.startswith("_"))


def split_file(name: str) -> tuple[Path, str] | None:
    """Return file and function of ``FILE.py`` or ``FILE.py:function``, or None for other names.

    The function of a file is ``recipe`` by default.
    """
    match = _FILE.fullmatch(name)
    return (Path(match["file"]), match["function"] or "recipe") if match else None


def check_recipe(name: str) -> None:
    """Refuse a name that is neither a recipe nor of the form ``FILE.py[:function]``; the file need not exist.

    Raises:
        UserError: Names the nearest recipe.
    """
    known = sorted(recipe_modules())
    if name not in known and split_file(name) is None:
        raise UserError(f"no recipe '{name}'; known: {', '.join(known)}.{nearest(name, known)}")
