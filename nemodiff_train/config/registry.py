"""Which recipes there are, told without importing one."""

from pathlib import Path

import recipes
from nemodiff_train.errors import UserError, nearest


def recipe_names() -> list[str]:
    """The recipes that come with the package."""
    return sorted(path.stem for path in Path(recipes.__path__[0]).glob("*.py") if path.stem != "__init__")


def check_recipe(name: str) -> None:
    """Refuse what is neither a page of ``recipes/`` nor the name of a Python file, there or not.

    Raises:
        UserError: Names the nearest page.
    """
    known = recipe_names()
    if name not in known and Path(name).suffix != ".py":
        raise UserError(f"no recipe '{name}'; known: {', '.join(known)}.{nearest(name, known)}")
