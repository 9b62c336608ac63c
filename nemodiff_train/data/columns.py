"""The fields of a record that make a document: a text, or a conversation."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Protocol

from nemodiff_train.data.messages import Conversation, check_text, read_conversation
from nemodiff_train.data.notes import LEFT_OUT, UNREAD_FIELDS, UNREAD_KEYS, Notes
from nemodiff_train.errors import UserError, nearest

Document = str | Conversation

_SYSTEM = ("system", "system_prompt")
_RECORD_MARKS = ("weight", "train", "training", "trainable", "loss_mask")
_UNWRITTEN = "?"
"""Stands where an answer is yet to be written."""


class Columns[Item](Protocol):
    """What is read of a record, and what becomes of it."""

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the fields that a record needs."""

    @property
    def option(self) -> str:
        """The option that names the fields, for messages to the user."""

    @property
    def notes(self) -> Notes:
        """Counts what is not used."""

    @property
    def of_texts(self) -> bool:
        """Whether the content of a file without records is such a field."""

    def reads(self, name: str) -> bool:
        """Return whether a field is used where it is there."""

    def document(self, row: Mapping[str, object], where: str) -> Item | None:
        """Return the document in a row that has the fields it needs, None where it is left out.

        Raises:
            UserError: A field is of another type.
        """


@dataclass(frozen=True)
class TextColumn:
    """A field that holds a text."""

    name: str
    notes: Notes = field(default_factory=Notes)
    option: str = "--text-field"
    of_texts: ClassVar = True

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the fields that a record needs."""
        return (self.name,)

    def reads(self, name: str) -> bool:
        """Return whether a field is used."""
        return name == self.name

    def document(self, row: Mapping[str, object], where: str) -> str | None:
        """Return the text in a row; see :class:`Columns`."""
        text = _text(row[self.name], self.name, where, self.option)
        if not text:
            self.notes.add(LEFT_OUT, "no text", where)
        return text or None


@dataclass(frozen=True)
class _ChatColumns(ABC):
    """What conversations of either kind have beside their messages: tools, and a system prompt."""

    notes: Notes = field(default_factory=Notes, kw_only=True)
    template: str | None = field(default=None, kw_only=True)
    """Source of the chat template; None to take it that it reads everything."""
    of_texts: ClassVar = False

    @property
    @abstractmethod
    def names(self) -> tuple[str, ...]:
        """Names of the fields that a record needs."""

    def reads(self, name: str) -> bool:
        """Return whether a field is used where it is there."""
        return name in (*self.names, "tools", *_SYSTEM, *_RECORD_MARKS)

    def _conversation(self, messages: object, row: Mapping[str, object], where: str) -> Conversation | None:
        for mark in _RECORD_MARKS:
            if row.get(mark) not in (None, 1):  # True as well
                raise UserError(f"{where}: '{mark}' is {row[mark]!r}; records are learned alike, so take it out")
        if row.get("tools") and self.template is not None and "tools" not in self.template:
            self.notes.add(UNREAD_KEYS, "tools (beside the messages)", where)
        systems = [row[name] for name in _SYSTEM if row.get(name)]
        if systems[1:] and systems[0] != systems[1]:
            raise UserError(f"{where}: '{_SYSTEM[0]}' and '{_SYSTEM[1]}' are two system prompts; take one out")
        system = systems[0] if systems else None
        return read_conversation(messages, row.get("tools"), system, where, self.template, self.notes)


@dataclass(frozen=True)
class MessagesColumn(_ChatColumns):
    """A field that holds a list of messages, each with ``role`` and ``content``."""

    name: str
    option: ClassVar = "--messages-field"

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the fields that a record needs."""
        return (self.name,)

    def document(self, row: Mapping[str, object], where: str) -> Conversation | None:
        """Return the conversation in a row; see :class:`Columns`."""
        return self._conversation(row[self.name], row, where)


@dataclass(frozen=True)
class AnswerColumns(_ChatColumns):
    """Two fields that hold a prompt and its answer."""

    prompt: str
    answer: str
    option: ClassVar = "--prompt-field, --answer-field"

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the fields that a record needs."""
        return (self.prompt, self.answer)

    def document(self, row: Mapping[str, object], where: str) -> Conversation | None:
        """Return the conversation in a row; see :class:`Columns`."""
        prompt, answer = (_text(row[name], name, where, self.option) for name in (self.prompt, self.answer))
        if not prompt or not answer:
            self.notes.add(LEFT_OUT, "no text", where)
            return None
        messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
        return self._conversation(messages, row, where)


@dataclass(frozen=True)
class PromptColumn(AnswerColumns):
    """A field that holds a prompt, and the name of one for the answer that it is to get."""

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the fields that a record needs."""
        return (self.prompt,)

    def reads(self, name: str) -> bool:
        """Return whether a field is used where it is there."""
        return name == self.answer or super().reads(name)

    def document(self, row: Mapping[str, object], where: str) -> Conversation | None:
        """Return the conversation in a row, its answer yet to be written; see :class:`Columns`."""
        return super().document({**row, self.answer: _UNWRITTEN}, where)


@dataclass(frozen=True)
class Record[Item]:
    """A document beside the record that it was read from."""

    fields: Mapping[str, object]
    document: Item


class WholeRecords[Item]:
    """Read every field of the records in which other columns find a document, and keep them.

    Args:
        columns: The other columns.
    """

    def __init__(self, columns: Columns[Item]) -> None:
        self.columns = columns
        self.names, self.option = columns.names, columns.option
        self.notes, self.of_texts = columns.notes, columns.of_texts

    def reads(self, name: str) -> bool:
        """Return True: every field is kept."""
        return True

    def document(self, row: Mapping[str, object], where: str) -> Record[Item] | None:
        """Return a row with its document; see :class:`Columns`."""
        document = self.columns.document(row, where)
        return None if document is None else Record(row, document)


def read_record[Item](columns: Columns[Item], row: Mapping[str, object], where: str) -> Item | None:
    """Return the document in a record, and count its fields that nothing reads.

    Raises:
        UserError: It lacks a field, or a field is not what it should be.
    """
    require(columns, list(row), where)
    for name, value in row.items():
        if not columns.reads(name) and value is not None:
            columns.notes.add(UNREAD_FIELDS, name, where)
    try:
        return columns.document(row, where)
    except RecursionError as error:
        raise UserError(f"{where}: nested too deeply; correct or remove it") from error


def require(columns: Columns[object], existing: Sequence[str], where: str) -> None:
    """Refuse records that lack a field.

    Raises:
        UserError: Names the missing field and the existing ones.
    """
    for name in columns.names:
        if name not in existing:
            known = ", ".join(existing) or "none"
            near = nearest(name, existing)
            raise UserError(f"{where}: no field '{name}'; its fields: {known} ({columns.option}).{near}")


def _text(value: object, name: str, where: str, option: str) -> str | None:
    if value is None:
        return None
    if not isinstance(value, str):
        raise UserError(f"{where}: field '{name}' is of type {type(value).__name__}, not text ({option})")
    check_text(value, name, lambda problem: UserError(f"{where}: {problem}"))
    return value
