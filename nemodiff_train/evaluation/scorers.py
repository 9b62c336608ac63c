"""Does a text hold the right answer? Three scorers, chosen by name."""

import re
from collections.abc import Callable
from decimal import Decimal

from nemodiff_train.errors import UserError, nearest

Scorer = Callable[[str, str], bool]
"""``scorer(text, answer)``: whether the decoded text is right."""

SCORERS = ("exact", "numeric", "regex")

# A minus belongs to the number only where it cannot be a subtraction: not after a digit, letter or bracket.
_NUMBER = re.compile(
    r"(?P<sign>(?<![\w).])[-\N{MINUS SIGN}])?\$?"
    r"(?P<digits>(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)"
)


def exact(text: str, answer: str) -> bool:
    """Equal once white space at both ends is stripped."""
    return text.strip() == answer.strip()


def last_number(text: str) -> Decimal | None:
    """The last number in ``text``: ``"so $1,234."`` is 1234; no exponents, no fractions."""
    matches = list(_NUMBER.finditer(text))
    if not matches:
        return None
    found = matches[-1]
    value = Decimal(found["digits"].replace(",", ""))
    return -value if found["sign"] else value


def numeric(text: str, answer: str) -> bool:
    """The last number of the text equals the last number of the answer, as exact decimals."""
    number = last_number(text)
    return number is not None and number == last_number(answer)


def regex(pattern: str) -> Scorer:
    """A scorer: the first group of the pattern's first match equals the answer, both stripped.

    Raises:
        UserError: The pattern does not compile or has no group.
    """
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


def make_scorer(name: str, pattern: str | None = None) -> Scorer:
    """The scorer called ``name``; ``regex`` needs a pattern, the others take none.

    Raises:
        UserError: Unknown name, or a pattern missing or not wanted.
    """
    if name not in SCORERS:
        raise UserError(f"unknown scorer '{name}'; known: {', '.join(SCORERS)}.{nearest(name, SCORERS)}")
    if (pattern is not None) != (name == "regex"):
        raise UserError("a pattern goes with the scorer 'regex', and only with it")
    if pattern is not None:
        return regex(pattern)
    return {"exact": exact, "numeric": numeric}[name]
