"""The names of the recipes, read without importing one."""

import ast
import re
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

import recipes
from nemodiff_train.errors import UserError, nearest

_FILE = re.compile(r"(?P<file>.*\.py)(?::(?P<function>[A-Za-z_]\w*))?", re.DOTALL)


def recipe_modules() -> dict[str, str]:
    """Return the module of every recipe by name: recipes are the public, lower-case names of ``recipes/*.py``."""
    return {name: file for file, (_, names) in recipe_files().items() for name in names}


def recipe_files() -> dict[str, tuple[str, list[str]]]:
    """Return for every module of recipes the first line of its docstring, and the names of its recipes."""
    files = {}
    for file in sorted(Path(recipes.__path__[0]).glob("*.py")):
        module = ast.parse(file.read_text())
        if names := list(_defined_names(module)):
            files[file.stem] = (ast.get_docstring(module) or "").partition("\n")[0], names
    return files


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


def is_field(key: str) -> bool:
    """Return whether a word sets a field of the configuration: all but one have a section, and so a dot."""
    return "." in key or key == "mixed_precision"


def check_arguments(name: str, words: Sequence[str]) -> None:
    """Refuse words that a recipe does not take, or the lack of one that it needs, without importing it.

    The signature is read from the source of the recipe's function; one that is built otherwise, or whose file is on
    another machine, is left to the start of the run.

    Raises:
        UserError: Names the argument, and the nearest one that there is.
    """
    keys = [split_word(word)[0] for word in words]
    file, function = split_file(name) or (Path(recipes.__path__[0]) / f"{recipe_modules().get(name)}.py", name)
    if not file.is_file():
        return
    try:
        module = ast.parse(file.read_text())
    except (SyntaxError, ValueError):
        return
    functions = [node for node in module.body if isinstance(node, ast.FunctionDef) and node.name == function]
    if not functions and split_file(name) is None:  # recipes/published.py makes it of the function of its stage
        stage = name.rpartition("_")[2]
        functions = [node for node in ast.walk(module) if isinstance(node, ast.FunctionDef) and node.name == stage]
    if not functions or (taken := functions[-1].args).kwarg or taken.vararg:
        return
    names = [argument.arg for argument in (*taken.posonlyargs, *taken.args)]
    defaults = dict(zip((argument.arg for argument in taken.kwonlyargs), taken.kw_defaults, strict=True))
    required = names[: len(names) - len(taken.defaults)]
    required += [key for key, default in defaults.items() if default is None]
    check_names(name, [key for key in keys if not is_field(key)], [*names, *defaults], required)


def split_word(word: str) -> tuple[str, str]:
    """Return the key and the value of a ``key=value`` word.

    Raises:
        UserError: It has no equals sign, or an argument has no value.
    """
    key, equals, value = word.partition("=")
    if not equals:
        raise UserError(f"'{word}' is not of the form key=value")
    if not value and not is_field(key):
        raise UserError(f"'{word}' has no value; name what {key or 'it'} is, or leave it out")
    return key, value


def check_names(name: str, given: Collection[str], known: Collection[str], required: Collection[str]) -> None:
    """Refuse arguments that a recipe does not take, or the lack of one that it needs.

    Args:
        name: The recipe.
        given: Arguments that it is given.
        known: Those that it takes.
        required: Those of them that have no default.

    Raises:
        UserError: Names the argument, and the nearest one that there is.
    """
    for key in given:
        if key not in known:
            raise UserError(
                f"recipe '{name}' takes no argument '{key}'; it takes {', '.join(known)} "
                "(fields of the configuration have a dot, section.field=value, but for mixed_precision)."
                f"{nearest(key, known)}"
            )
    if missing := [key for key in required if key not in given]:
        raise UserError(f"recipe '{name}' needs {', '.join(f'{key}=...' for key in missing)}")


def check_recipe(name: str) -> None:
    """Refuse a name that is neither a recipe nor of the form ``FILE.py[:function]``; the file need not exist.

    Raises:
        UserError: Names the nearest recipe.
    """
    known = sorted(recipe_modules())
    if name not in known and split_file(name) is None:
        raise UserError(f"no recipe '{name}'; known: {', '.join(known)}.{nearest(name, known)}")
