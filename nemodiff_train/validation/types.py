"""Whether a setting has the type that its field declares; Hydra puts anything anywhere."""

import functools
import math
from dataclasses import is_dataclass
from typing import Any, Literal, get_args, get_origin, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.errors import PydanticUserError

from nemodiff_train.errors import UserError, nearest

_ANY = ConfigDict(arbitrary_types_allowed=True)


def check_setting(config: Any, key: str) -> None:
    """Refuse a value that is not of its field's declared type, or no number where one is meant.

    Fields whose types only Megatron understands are left to it.

    Args:
        config: A dataclass of dataclasses.
        key: Dotted path of a setting in it, which exists.

    Raises:
        UserError: Names the key, the value and what it should be.
    """
    *path, name = key.split(".")
    owner = functools.reduce(lambda node, part: getattr(node, part, None), path, config)
    if not is_dataclass(owner) or not hasattr(owner, name):
        return
    kind: type = type(owner)
    _check_choice(key, getattr(owner, name), _hint(kind, name))
    value, adapter = getattr(owner, name), _adapter(kind, name)
    if isinstance(value, float) and math.isnan(value):
        raise UserError(f"{key}={value} is no number")
    if adapter is None or value is None:  # None is "not set" in many fields that do not say so
        return
    try:
        fitting = adapter.validate_python(value)
    except ValidationError as error:
        problem = error.errors()[0]
        # Hydra takes 17 for a number and true for a truth value.
        hint = "; such text goes in two pairs of quotes" if problem["type"] == "string_type" else ""
        raise UserError(f"{key}={value!r:.200}: {problem['msg'][0].lower()}{problem['msg'][1:]}{hint}") from None
    if isinstance(value, str) and isinstance(fitting, bool | int | float):
        raise UserError(f"{key}={value!r:.200} is text in quotes; write it without")
    if isinstance(value, float) and isinstance(fitting, bool | int):
        raise UserError(f"{key}={value} is written as a fraction; write {fitting}")


def _check_choice(key: str, value: Any, hint: Any) -> None:
    """Refuse what is none of a ``Literal``'s choices, or of those of its fields that may be unset."""
    kinds = [kind for kind in (hint, *get_args(hint)) if get_origin(kind) is Literal]
    choices = [choice for kind in kinds for choice in get_args(kind)]
    if choices and value is not None and value not in choices:
        known = "', '".join(map(str, choices))
        raise UserError(f"{key} is '{value}'; use '{known}'.{nearest(str(value), map(str, choices))}")


def _hint(owner: type, name: str) -> Any:
    """The declared type of a field; None where only Megatron can tell."""
    try:
        return get_type_hints(owner).get(name)
    except (NameError, TypeError):
        return None


def _adapter(owner: type, name: str) -> TypeAdapter[Any] | None:
    """A check of the field's type; none where it is no plain type, or where its choices have a better message."""
    hint = _hint(owner, name)
    if hint is None or get_origin(hint) is Literal:
        return None
    try:
        adapter: TypeAdapter[Any] = TypeAdapter(hint, config=_ANY if not is_dataclass(hint) else None)
        return adapter if adapter.pydantic_complete else None
    except (NameError, TypeError, PydanticUserError):  # of Megatron's own
        return None
