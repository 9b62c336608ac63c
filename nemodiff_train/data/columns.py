"""The fields of a record that make a document: a text, or a conversation."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from nemodiff_train.errors import UserError, nearest

Message = dict[str, object]
"""A message as a chat template takes it, with ``role`` and ``content``."""


@dataclass(frozen=True)
class Conversation:
    """The messages of a conversation."""

    messages: list[Message]
    where: str
    """File and line, for messages to the user."""


Document = str | Conversation


@dataclass(frozen=True)
class TextColumn:
    """A field that holds a text."""

    name: str
    option = "--text-field"
    """The option that names the field, for messages to the user."""

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the fields that make a document."""
        return (self.name,)

    def document(self, row: Mapping[str, object], where: str) -> str | None:
        """Return the document in a row that has these fields, None where it is empty.

        Raises:
            UserError: A field is of another type.
        """
        return _text(row[self.name], self.name, where, self.option)


@dataclass(frozen=True)
class MessagesColumn:
    """A field that holds a list of messages, each with ``role`` and ``content``."""

    name: str
    option = "--messages-field"

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the fields that make a document."""
        return (self.name,)

    def document(self, row: Mapping[str, object], where: str) -> Conversation | None:
        """Return the conversation in a row; see :class:`TextColumn`."""
        messages = row[self.name]
        if not messages:
            return None
        if not isinstance(messages, list) or not all(isinstance(m, dict) and m.get("role") for m in messages):
            raise UserError(f"{where}: '{self.name}' is not a list of messages with 'role' and 'content'")
        roles = [str(message["role"]) for message in messages]
        if "assistant" not in roles:
            raise UserError(f"{where}: no message of role 'assistant' to learn; its roles: {', '.join(roles)}")
        for message in messages:
            if isinstance(message.get("content"), str):
                _text(message["content"], self.name, where, self.option)
        # A Parquet column has every key in every message.
        return Conversation([{k: v for k, v in m.items() if v is not None} for m in messages], where)


@dataclass(frozen=True)
class AnswerColumns:
    """Two fields that hold a prompt and its answer."""

    prompt: str
    answer: str
    option = "--prompt-field, --answer-field"

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the fields that make a document."""
        return (self.prompt, self.answer)

    def document(self, row: Mapping[str, object], where: str) -> Conversation | None:
        """Return the conversation in a row; see :class:`TextColumn`."""
        prompt, answer = (_text(row[name], name, where, self.option) for name in self.names)
        if not prompt or not answer:
            return None
        return Conversation([{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}], where)


Columns = TextColumn | MessagesColumn | AnswerColumns


def require(columns: Columns, existing: Sequence[str], where: str) -> None:
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
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{where}: half a surrogate pair in '{name}'; correct or remove it") from error
    return value or None
