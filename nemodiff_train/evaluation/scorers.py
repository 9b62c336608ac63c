"""Decide whether a text holds the right answer, by one of three scorers."""

import re
from collections.abc import Callable
from decimal import Decimal

from nemodiff_train.errors import UserError, nearest

Scorer = Callable[[str, str], bool]
"""``scorer(text, answer)`` returns whether the decoded text is right."""

SCORERS = ("exact", "numeric", "regex")

# A minus belongs to the number only where it cannot be a subtraction: not after a digit, letter or bracket.
_NUMBER = re.compile(
    r"(?P<sign>(?<![\w).])[-\N{MINUS SIGN}])?\$?"
    r"(?P<digits>(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)"
)


def exact(text: str, answer: str) -> bool:
    """Return whether text and answer are equal once white space at both ends is stripped."""
    return text.strip() == answer.strip()


def last_number(text: str) -> Decimal | None:
    """Return the last number in ``text``: ``"so $1,234."`` is 1234; no exponents, no fractions."""
    matches = list(_NUMBER.finditer(text))
    if not matches:
        return None
    value = Decimal(matches[-1]["digits"].replace(",", ""))
    return -value if matches[-1]["sign"] else value


def numeric(text: str, answer: str) -> bool:
    """Return whether the last numbers of text and answer are equal, as exact decimals."""
    number = last_number(text)
    return number is not None and number == last_number(answer)


def make_scorer(name: str, pattern: str | None = None) -> Scorer:
    """Return the scorer called ``name``.

    Args:
        name: One of :data:`SCORERS`.
        pattern: Of ``regex`` alone: the first group of its first match has to equal the answer, both stripped.

    Raises:
        UserError: Unknown name; or a pattern is missing, not wanted, does not compile or has no group.
    """
    if name not in SCORERS:
        raise UserError(f"unknown scorer '{name}'; known: {', '.join(SCORERS)}.{nearest(name, SCORERS)}")
    if (pattern is not None) != (name == "regex"):
        raise UserError("a pattern goes with the scorer 'regex', and only with it")
    if pattern is None:
        return {"exact": exact, "numeric": numeric}[name]
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise UserError(f"the pattern '{pattern}' is not a regular expression: {error}") from error
    if not compiled.groups:
        raise UserError(f"the pattern '{pattern}' has no group: put ( ) around the answer")

    def score(text: str, answer: str) -> bool:
        match = compiled.search(text)
        return match is not None and match[1] is not None and exact(match[1], answer)

    return score
