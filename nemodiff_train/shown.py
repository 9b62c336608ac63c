"""Text from outside as it can be shown: what would steer a terminal, or turn the text around, is spelled out."""

import re

_STEERING = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]|\r(?!\n)"
)
"""Control codes, line separators, bidirectional controls, and halves of characters that cannot be encoded."""


def visible(text: str) -> str:
    """Return a text of any number of lines that looks like what it is, and does nothing else."""
    return _STEERING.sub(lambda match: _spelled(match[0]), text)


def in_a_line(text: str) -> str:
    """Return a text on one line, with all that has no shape of its own spelled out."""
    return "".join(character if character.isprintable() else _spelled(character) for character in text)


def _spelled(character: str) -> str:
    return character.encode("unicode_escape").decode()
