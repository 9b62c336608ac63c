"""Content from outside, checked against a schema before any of it is used."""

import functools
import json
import math
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.errors import PydanticUserError

from nemodiff_train.errors import UserError, nearest

AS_WRITTEN = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)
"""Configuration of a schema for a file that others write: its types are not converted, and other keys are theirs."""


def checked[Kind](schema: type[Kind], content: object, where: object, remedy: str = "fetch it again") -> Kind:
    """Return content as what a schema makes of it.

    Args:
        schema: A type that pydantic knows.
        content: JSON as ``bytes``, or what was read already.
        where: Names the file, and the line, in the refusal.
        remedy: What the user can do.

    Raises:
        UserError: Names the file, the field, its value, and what it should be.
    """
    adapter: TypeAdapter[Kind] = _ADAPTERS.get(schema) or _ADAPTERS.setdefault(schema, TypeAdapter(schema))
    try:
        return adapter.validate_json(content) if isinstance(content, bytes) else adapter.validate_python(content)
    except ValidationError as error:
        raise UserError(f"'{where}': {_first_problem(error)}; {remedy}") from None


def _first_problem(error: ValidationError) -> str:
    """Return the first field that does not fit, its value, and what it should be."""
    first = error.errors(include_url=False)[0]
    name, message = ".".join(map(str, first["loc"])), f"{first['msg'][:1].lower()}{first['msg'][1:]}"
    if first["type"] in ("missing", "json_invalid") or not name:
        return f"{name}: {message}" if name else message
    return f"{name} is {first['input']!r:.100}: {message}"


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        UserError: The file holds something else.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"'{file}' is not JSON ({error}); fetch it again") from None
    if not isinstance(content, dict):
        raise UserError(f"'{file}' holds no settings; fetch it again")
    return content


def check_type(config: object, key: str, *, as_written: bool = True) -> None:
    """Refuse a value that does not have the declared type of its field, or is NaN.

    Fields whose types only Megatron understands are left to it.

    Args:
        config: A dataclass of dataclasses.
        key: Dotted path of a setting in it, which exists.
        as_written: Whether a whole number has to be written as one.

    Raises:
        UserError: Names the key, the value and what it should be.
    """
    *path, name = key.split(".")
    section = functools.reduce(lambda node, part: getattr(node, part, None), path, config)
    if not is_dataclass(section) or not hasattr(section, name):
        return
    hint, value = declared_type(type(section), name), getattr(section, name)
    _check_choice(key, value, hint)
    if isinstance(value, float) and math.isnan(value):
        raise UserError(f"{key}={value} is not a number")
    adapter = _type_adapter(hint)
    if adapter is None:
        return
    if value is None:
        if as_written and not _may_be_unset(type(section), name, adapter):
            raise UserError(f"{key} cannot be null; leave it out")
        return
    try:
        converted = adapter.validate_python(value)
    except ValidationError as error:
        message = error.errors()[0]["msg"]
        raise UserError(f"{key}={value!r:.200}: {message[0].lower()}{message[1:]}") from None
    if isinstance(value, str) and isinstance(converted, bool | int | float):
        raise UserError(f"{key}={value!r:.200} is text in quotes; write it without")
    if as_written and isinstance(value, bool) != isinstance(converted, bool):
        raise UserError(f"{key}={value} is {'not a number' if isinstance(value, bool) else 'neither true nor false'}")
    if as_written and isinstance(value, float) and isinstance(converted, bool | int):
        raise UserError(f"{key}={value} is written as a fraction; write {converted}")


def _may_be_unset(section: type, name: str, adapter: TypeAdapter[Any]) -> bool:
    """Return whether None is a value of a field: by its type, or as the default of one that does not declare it."""
    default = next(field.default for field in fields(section) if field.name == name)
    try:
        return default is None or adapter.validate_python(None) is None
    except ValidationError:
        return False


def _check_choice(key: str, value: object, hint: object) -> None:
    """Refuse a value outside the choices of a ``Literal``, or of a ``Literal | None``."""
    literals = [kind for kind in (hint, *get_args(hint)) if get_origin(kind) is Literal]
    choices = [str(choice) for kind in literals for choice in get_args(kind)]
    if choices and value is not None and str(value) not in choices:
        known = "', '".join(choices)
        raise UserError(f"{key} is '{value}'; use '{known}'.{nearest(str(value), choices)}")


def declared_type(section: type, name: str) -> Any:
    """Return the declared type of a field, or None where only Megatron can resolve it."""
    try:
        return _hints(section).get(name)
    except (NameError, TypeError):
        return None


def _type_adapter(hint: Any) -> TypeAdapter[Any] | None:
    """Return a validator of a type, or None for Megatron's own types."""
    if hint is None:
        return None
    allow_any_class = ConfigDict(arbitrary_types_allowed=True)
    try:
        adapter: TypeAdapter[Any] = TypeAdapter(hint, config=None if is_dataclass(hint) else allow_any_class)
        return adapter if adapter.pydantic_complete else None
    except (NameError, TypeError, PydanticUserError):
        return None


_hints = functools.cache(get_type_hints)
_ADAPTERS: dict[object, TypeAdapter[Any]] = {}  # of the schemas that were asked for: making one takes milliseconds
