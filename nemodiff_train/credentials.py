"""Refuse settings that hold keys or passwords: the settings of a run are saved and logged."""

import os
import re
from collections.abc import Mapping

from nemodiff_train.errors import UserError

_KEY = "api_?key|secret(_key)?|password|passwd|access_?key|(auth|access|hf|hub)_token"
_VARIABLE = re.compile(rf"(^|_)({_KEY}|token)$", re.IGNORECASE)
_SETTING = re.compile(rf"(^|[._])({_KEY})$", re.IGNORECASE)
_LEAST = 8  # characters; a shorter value may well occur by chance


def check_no_secrets(settings: Mapping[str, str]) -> None:
    """Refuse settings that would put a key into saved configurations and logs.

    Args:
        settings: The ``key=value`` overrides of the command line, as key and value.

    Raises:
        UserError: A setting is meant for a key, has the value of one in the environment, or reads the environment;
            the line does not hold the value.
    """
    known = {name: value for name, value in os.environ.items() if _VARIABLE.search(name) and len(value) >= _LEAST}
    for key, value in settings.items():
        if _SETTING.search(key) and value.strip("'\"").lower() not in ("", "null", "none"):
            raise UserError(
                f"{key} would hold a key, and settings are saved and logged; leave it out and set the environment "
                "variable that the service reads"
            )
        if name := next((name for name, secret in known.items() if secret in f"{key}={value}"), None):
            raise UserError(f"a setting holds the value of {name}, and settings are saved and logged; leave it out")
        if "${" in value:
            raise UserError(f"{key}: '${{...}}' could read the environment, and settings are saved; write the value")
