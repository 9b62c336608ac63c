"""What is taken from a record: a text, or a conversation."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nemodiff_train.errors import UserError, nearest


@dataclass(frozen=True)
class Conversation:
    """Messages as a chat template takes them, and where they come from."""

    messages: list[dict[str, Any]]
    where: str


Document = str | Conversation


@dataclass(frozen=True)
class TextColumn:
    """A text."""

    name: str
    option = "--text-field"
    """The option that names the field, for messages."""

    @property
    def names(self) -> tuple[str, ...]:
        """The fields that make a document."""
        return (self.name,)

    def document(self, row: Mapping[str, Any], where: str) -> str | None:
        """The document in a row that has these fields, None where there is nothing in it.

        Raises:
            UserError: A field holds something else.
        """
        return _text(row[self.name], self.name, where, self.option)


@dataclass(frozen=True)
class MessagesColumn:
    """A list of messages, each with a ``role`` and what it says."""

    name: str
    option = "--messages-field"

    @property
    def names(self) -> tuple[str, ...]:
        """As of :class:`TextColumn`."""
        return (self.name,)

    def document(self, row: Mapping[str, Any], where: str) -> Conversation | None:
        """As of :class:`TextColumn`."""
        messages = row[self.name]
        if not messages:
            return None
        if not isinstance(messages, list) or not all(isinstance(m, dict) and m.get("role") for m in messages):
            raise UserError(f"{where}: '{self.name}' is no list of messages with 'role' and 'content'")
        roles = [str(message["role"]) for message in messages]
        if "assistant" not in roles:
            raise UserError(f"{where}: no message of the role 'assistant' to learn; its roles: {', '.join(roles)}")
        for message in messages:
            if isinstance(message.get("content"), str):
                _text(message["content"], self.name, where, self.option)
        # Columns of Parquet have every key in every message.
        return Conversation([{k: v for k, v in m.items() if v is not None} for m in messages], where)


@dataclass(frozen=True)
class AnswerColumns:
    """A prompt and its answer."""

    prompt: str
    answer: str
    option = "--prompt-field, --answer-field"

    @property
    def names(self) -> tuple[str, ...]:
        """As of :class:`TextColumn`."""
        return (self.prompt, self.answer)

    def document(self, row: Mapping[str, Any], where: str) -> Conversation | None:
        """As of :class:`TextColumn`."""
        said = [_text(row[name], name, where, self.option) for name in self.names]
        if not all(said):
            return None
        roles = "user", "assistant"
        return Conversation([{"role": r, "content": s} for r, s in zip(roles, said, strict=True)], where)


Columns = TextColumn | MessagesColumn | AnswerColumns


def require(columns: Columns, existing: Sequence[str], where: str) -> None:
    """Refuse records that lack a field.

    Raises:
        UserError: Names it, and the fields that are there.
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
