"""Replace a function of a third party, after a look at whether it still is what the replacement was written for."""

import inspect
from typing import Any

REPLACED: dict[str, Any] = {}
"""Originals of the functions replaced in this process, by their full names."""


class UnknownSignature(RuntimeError):
    """A third party's function is not the one that a patch was written for."""


def replace(owner: Any, name: str, new: Any, takes: str | None) -> Any:
    """Put ``new`` in the place of ``owner.name``.

    Args:
        owner: Module or class.
        name: Name in it.
        new: What takes the place.
        takes: Parameters of the original, ``"a, b"``; with ``", ..."`` at the end there may be more.  None for what
            has no signature in Python: a value, a class, or a function of the C library.

    Returns:
        The original, at every call for this name.

    Raises:
        UnknownSignature: There is nothing of that name, or it takes other parameters.
    """
    full_name = f"{getattr(owner, '__module__', None) or ''}.{owner.__name__}.{name}".lstrip(".")
    if full_name not in REPLACED:
        REPLACED[full_name] = _known(owner, name, full_name, takes)
    setattr(owner, name, new)
    return REPLACED[full_name]


def replace_in(thing: Any, name: str, new: Any, takes: str | None) -> Any:
    """Put ``new`` in the place of an attribute of one object, and return what was there.

    The arguments and errors are those of :func:`replace`; ``takes`` is without ``self``.  A method may be replaced
    again if what took its place wraps it.
    """
    original = _known(thing, name, f"{type(thing).__module__}.{type(thing).__name__}.{name}", takes)
    setattr(thing, name, new)
    return original


def _known(owner: Any, name: str, full_name: str, takes: str | None) -> Any:
    """Return ``owner.name``, if it is what a patch was written for."""
    if not hasattr(owner, name):
        raise UnknownSignature(f"{full_name} is gone; remove its patch, or adapt it to this version")
    original = getattr(owner, name)
    if takes is not None:
        _check_parameters(full_name, list(inspect.signature(original).parameters), takes)
    return original


def _check_parameters(full_name: str, parameters: list[str], takes: str) -> None:
    expected = takes.split(", ") if takes else []
    if expected[-1:] == ["..."]:
        expected, parameters = expected[:-1], parameters[: len(expected) - 1]
    if parameters != expected:
        raise UnknownSignature(
            f"{full_name} takes ({', '.join(parameters)}), but its patch was written for ({takes}); adapt the patch "
            "to this version, or install the version that pyproject.toml names"
        )
