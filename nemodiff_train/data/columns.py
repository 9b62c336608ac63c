"""The fields of a record that make a document: a text, or a conversation."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from nemodiff_train.data.messages import Conversation, check_text, read_conversation
from nemodiff_train.data.notes import LEFT_OUT, UNREAD_FIELDS, UNREAD_KEYS, Notes
from nemodiff_train.errors import UserError, nearest

Document = str | Conversation
Row = Mapping[str, object]
"""The fields of a record."""

_SYSTEM = ("system", "system_prompt")
_RECORD_MARKS = ("weight", "train", "training", "trainable", "loss_mask")


class Columns[Item](ABC):
    """The fields that are read of a record, and the document that they make.

    Args:
        option: The option that names the fields, for messages to the user.
        *names: Names of the fields that a record needs.
    """

    of_texts = False
    """Whether the content of a file without records is such a field."""

    def __init__(self, option: str, *names: str) -> None:
        self.option, self.names = option, names
        self.notes = Notes()
        """Counts what is not used."""

    def reads(self, name: str) -> bool:
        """Return whether a field is used where it is there."""
        return name in self.names

    @abstractmethod
    def document(self, row: Row, where: str) -> Item | None:
        """Return the document in a row that has the fields it needs, None where it is left out.

        Raises:
            UserError: A field is of another type; it does not say where.
        """

    def _text(self, row: Row, name: str) -> str:
        """Return the text in a field, empty for null."""
        text = "" if row[name] is None else row[name]
        if not isinstance(text, str):
            raise UserError(
                f"field '{name}' is of type {type(text).__name__}, not text; correct or remove the record, or name "
                f"another field ({self.option})"
            )
        check_text(text, name)
        return text


class TextColumn(Columns[str]):
    """A field that holds a text."""

    of_texts = True

    def __init__(self, name: str, option: str = "--text-field") -> None:
        super().__init__(option, name)

    def document(self, row: Row, where: str) -> str | None:
        """Return the text in a row; see :class:`Columns`."""
        text = self._text(row, self.names[0])
        if not text:
            self.notes.add(LEFT_OUT, "no text", where)
        return text or None


class _ChatColumns(Columns[Conversation]):
    """Fields of conversations of either kind beside the messages: tools, and a system prompt."""

    template: str | None
    """Source of the chat template; None to assume that it reads everything."""

    def reads(self, name: str) -> bool:
        """Return whether a field is used where it is there."""
        return name in (*self.names, "tools", *_SYSTEM, *_RECORD_MARKS)

    def _conversation(self, messages: object, row: Row, where: str) -> Conversation | None:
        for mark in _RECORD_MARKS:
            if row.get(mark) not in (None, 1):  # True as well
                raise UserError(f"'{mark}' is {row[mark]!r}; per-record loss weights are not supported; remove it")
        if row.get("tools") and self.template is not None and "tools" not in self.template:
            self.notes.add(UNREAD_KEYS, "tools (beside the messages)", where)
        systems = [row[name] for name in _SYSTEM if row.get(name)]
        if systems[1:] and systems[0] != systems[1]:
            raise UserError(f"'{_SYSTEM[0]}' and '{_SYSTEM[1]}' are two system prompts; remove one")
        system = systems[0] if systems else None
        return read_conversation(messages, row.get("tools"), system, where, self.template, self.notes)


class MessagesColumn(_ChatColumns):
    """A field that holds a list of messages, each with ``role`` and ``content``."""

    def __init__(self, name: str, template: str | None = None) -> None:
        super().__init__("--messages-field", name)
        self.template = template

    def document(self, row: Row, where: str) -> Conversation | None:
        """Return the conversation in a row; see :class:`Columns`."""
        return self._conversation(row[self.names[0]], row, where)


class AnswerColumns(_ChatColumns):
    """Two fields that hold a prompt and its answer.

    Args:
        prompt: Name of the first field.
        answer: Name of the second field.
        template: Source of the chat template; None to assume that it reads everything.
        unwritten: Whether answers are yet to be written: a record needs none, and none is read.
    """

    def __init__(self, prompt: str, answer: str, template: str | None = None, unwritten: bool = False) -> None:
        super().__init__("--prompt-field, --answer-field", *([prompt] if unwritten else [prompt, answer]))
        self.prompt, self.answer, self.template, self.unwritten = prompt, answer, template, unwritten

    def reads(self, name: str) -> bool:
        """Return whether a field is used where it is there."""
        return name == self.answer or super().reads(name)

    def document(self, row: Row, where: str) -> Conversation | None:
        """Return the conversation in a row; see :class:`Columns`."""
        prompt = self._text(row, self.prompt)
        answer = "?" if self.unwritten else self._text(row, self.answer)
        if not prompt or not answer:
            self.notes.add(LEFT_OUT, "no text", where)
            return None
        messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
        return self._conversation(messages, row, where)


@dataclass(frozen=True)
class Record[Item]:
    """A document beside the record that it was read from."""

    fields: Row
    document: Item


class RecordsWithDocuments[Item](Columns[Record[Item]]):
    """Whole records, each beside the document that other columns find in it."""

    def __init__(self, columns: Columns[Item]) -> None:
        super().__init__(columns.option, *columns.names)
        self.columns, self.notes, self.of_texts = columns, columns.notes, columns.of_texts

    def reads(self, name: str) -> bool:
        """Return True: every field is kept."""
        return True

    def document(self, row: Row, where: str) -> Record[Item] | None:
        """Return a row with its document; see :class:`Columns`."""
        document = self.columns.document(row, where)
        return None if document is None else Record(row, document)


def read_record[Item](columns: Columns[Item], row: object, where: str) -> Item | None:
    """Return the document in a record, and count its fields that nothing reads.

    Raises:
        UserError: The record is not an object, lacks a field, or has one of another type.
    """
    if not isinstance(row, dict):
        raise UserError(f"{where}: expected a JSON object with the field '{columns.names[0]}'")
    require(columns, list(row), where)
    for name, value in row.items():
        if not columns.reads(name) and value is not None:
            columns.notes.add(UNREAD_FIELDS, name, where)
    try:
        return columns.document(row, where)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
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
