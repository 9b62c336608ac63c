"""Counted remarks on what records hold and a data set does not."""

from collections import Counter

from rich.text import Text

from nemodiff_train.console import console

UNREAD_FIELDS = "fields of records that are not read"
UNREAD_KEYS = "keys of messages that the chat template does not read"
NULLS = "null values inside messages, taken for Arrow's filling"
TRAILING = "messages after the last answer, which are not used"
LEFT_OUT = "records left out"


class Notes:
    """The count of each remark and its first occurrence; printed once, one line per kind."""

    def __init__(self) -> None:
        self._counts: dict[str, Counter[str]] = {}
        self._first: dict[str, str] = {}

    def add(self, kind: str, what: str, where: str, count: int = 1) -> None:
        """Count a remark.

        Args:
            kind: One of the constants of this module.
            what: A field, a key or a reason.
            where: File and line.
            count: Number of records.
        """
        self._counts.setdefault(kind, Counter())[what] += count
        self._first.setdefault(kind, where)

    def print(self) -> None:
        """Print every kind with its counts."""
        for kind, counts in self._counts.items():
            listed = ", ".join(f"{what} ({count:,})" for what, count in counts.most_common())
            first = f"; first in {self._first[kind]}"
            console.print(Text.assemble((f"{kind}:", "yellow"), f" {listed}{first}"), soft_wrap=True)
