"""Turn a refusal by an exception into a line of a list."""

from collections.abc import Callable

from nemodiff_train.errors import UserError


def refusal(call: Callable[[], object]) -> list[str]:
    """Return the message of the ``UserError`` that a call raises, or an empty list."""
    try:
        call()
    except UserError as error:
        return [str(error)]
    return []
